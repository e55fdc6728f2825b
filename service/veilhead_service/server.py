"""The process that listens: how it starts, drains and ends.

On the first SIGTERM, SIGINT or SIGQUIT `/readyz` turns 503 and new queries are refused at once;
after `drain_delay_seconds` the listener closes; queries that run have `drain_seconds` to end; the
process then ends with status 0. A second signal ends it at once, with 128 and the signal's number.
SIGHUP does nothing: the log is standard error, and the access log needs no telling.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, Final, cast

import uvicorn
from fastapi import FastAPI

from veilhead_protocol.errors import ServiceError
from veilhead_protocol.hardening import forbid_core_dumps, raise_descriptor_limit
from veilhead_service.connections import Connection, ConnectionLimits, Connections, Front
from veilhead_service.pacing import Pacing
from veilhead_service.settings import Settings
from veilhead_service.telemetry import network_metrics
from veilhead_service.workers import WorkerPool

#: Of uvicorn's ticks, ten a second, every so many looks for connections that stall.
_TICKS: Final = 5

#: Connections that wait to be accepted; asyncio accepts as many at once, before any is counted.
BACKLOG: Final = 128

logger = logging.getLogger("veilhead.service")


class _Server(uvicorn.Server):
    """Uvicorn's server, which drains the pool before it closes the listener."""

    def __init__(
        self, config: uvicorn.Config, pool: WorkerPool, connections: Connections, delay: float
    ) -> None:
        super().__init__(config)
        self._pool = pool
        self._connections = connections
        self._delay_seconds = delay
        self._closes: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Begin to drain, or end at once when that has begun already."""
        if self._closes is not None:
            # Nothing is lost by it: state on disk survives a crash, and workers end when their
            # socket closes.
            os._exit(128 + sig)
        self._pool.drain()
        self._closes = time.monotonic() + self._delay_seconds

    async def on_tick(self, counter: int) -> bool:
        """Whether the listener is to close; uvicorn asks ten times a second."""
        if self._closes is not None and time.monotonic() >= self._closes:
            self.should_exit = True
        if counter % _TICKS == 0:
            self._connections.close_stalled()
        return await super().on_tick(counter)


def serve(app: FastAPI, settings: Settings, *, host: str, port: int) -> None:
    """Serve an app that `create_app` made, in this process, until a signal ends it.

    Raises:
        ConfigurationError: when the limit of open files allows too few connections.
        ServiceError: when it cannot start; as any other error, it says why.
    """
    forbid_core_dumps()
    most = settings.connections(raise_descriptor_limit())
    services = app.state.services
    connections = Connections(
        ConnectionLimits(
            connections=most,
            peer_connections=settings.peer_connections or -(-most // 2),
            header_seconds=settings.body_seconds,
            unread_seconds=settings.unread_seconds,
        ),
        Pacing(settings.refusals_per_second),
        services.strangers.note,
    )
    services.telemetry.watch(network_metrics(lambda: len(connections), most, services.strangers))
    config = uvicorn.Config(
        Front(app),
        host=host,
        port=port,
        access_log=False,
        log_config=None,  # `logs.configure` did it
        http=cast("Any", partial(Connection, connections=connections)),
        ws="none",
        backlog=BACKLOG,
        server_header=False,
        proxy_headers=False,  # nothing here asks for a client's address
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
    )
    server = _Server(config, services.pool, connections, settings.drain_delay_seconds)
    # Ignored, not handled: the workers inherit that.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGQUIT, server.handle_exit)
    logger.info("at most %d connections", most)
    with suppress(SystemExit):  # how uvicorn says that it has not started
        server.run()
    if not server.started:
        failure = getattr(app.state, "failure", None)
        raise failure or ServiceError(f"cannot listen on {host} port {port}; the log says why")
