"""The gateway's process: how it starts, drains and ends."""

from __future__ import annotations

import asyncio
import logging
from types import FrameType
from typing import Final

import uvicorn

from veilhead.gateway.app import Gateway, create_app
from veilhead.gateway.connections import guarded
from veilhead_protocol.errors import InputError
from veilhead_protocol.hardening import forbid_core_dumps
from veilhead_protocol.loopback import is_loopback

_logger = logging.getLogger("veilhead.gateway")

#: Requests that run when a signal comes have so long to end.
_DRAIN_SECONDS: Final = 30


class _Server(uvicorn.Server):
    """Uvicorn's server; a first signal turns /health to 503, and what runs is answered."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Begin to drain, or end without waiting when that has begun already."""
        # Uvicorn's own would raise the signal again at the end, before the keys are dropped.
        self.force_exit = self.should_exit
        self.should_exit = True
        self._gateway.draining = True


def check_exposure(gateway: Gateway, host: str) -> None:
    """Refuse to offer plaintext to a network without asking who is there.

    Raises:
        InputError: when the host is not loopback, and everybody may ask.
    """
    if gateway.callers is None and not is_loopback(host):
        raise InputError(
            f"the gateway would answer everybody who reaches {host}: give the callers' tokens "
            "(--callers FILE), or listen on 127.0.0.1"
        )


def serve(gateway: Gateway, host: str, port: int) -> None:
    """Serve until a signal ends it.

    Raises:
        InputError: when everybody could ask from beyond this machine.
        VeilheadError: when the client cannot connect, or the backbone cannot be loaded.
    """
    check_exposure(gateway, host)
    if not is_loopback(host):
        _logger.warning(
            "texts come in over plain HTTP on %s port %d: put a proxy in front that speaks TLS",
            host,
            port,
        )
    forbid_core_dumps()  # one would hold texts
    guard, options = guarded(create_app(gateway), gateway.limits.max_connections)
    config = uvicorn.Config(
        guard,
        host=host,
        port=port,
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=_DRAIN_SECONDS,
        **options,
    )

    async def run() -> None:
        async with gateway.running():
            manifest = gateway.client.manifest
            _logger.info(
                "answering for %s (digest %s) on %s port %d",
                manifest.name,
                manifest.digest.hex()[:12],
                host,
                port,
            )
            await _Server(config, gateway).serve()

    asyncio.run(run())
