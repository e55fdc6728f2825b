"""The process that listens: how it starts, drains and ends.

On the first SIGTERM or SIGINT `/readyz` turns 503 and new queries are refused at once; after
`drain_delay_seconds` the listener closes; queries that run have `drain_seconds` to end; the process
then ends with status 0. A second signal ends it at once, with 128 and the signal's number.
"""

from __future__ import annotations

import math
import os
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from veilhead_service.hardening import forbid_core_dumps
from veilhead_service.settings import Settings
from veilhead_service.workers import WorkerPool


class _Server(uvicorn.Server):
    """Uvicorn's server, which drains the pool before it closes the listener."""

    def __init__(self, config: uvicorn.Config, pool: WorkerPool, delay_seconds: float) -> None:
        super().__init__(config)
        self._pool = pool
        self._delay_seconds = delay_seconds
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
        return await super().on_tick(counter)


def serve(app: FastAPI, settings: Settings, *, host: str, port: int) -> None:
    """Serve an app that `create_app` made, in this process, until a signal ends it."""
    forbid_core_dumps()
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
    )
    _Server(config, app.state.services.pool, settings.drain_delay_seconds).run()
