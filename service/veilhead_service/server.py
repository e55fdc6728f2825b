"""The process that listens: how it starts, drains and ends.

On the first SIGTERM or SIGINT `/readyz` turns 503 and new queries are refused at once; after
`drain_delay_seconds` the listener closes; queries that run have `drain_seconds` to end; the process
then ends with status 0. A second signal ends it at once, with 128 and the signal's number.

A connection that does not send a whole request header in time is closed, and so is one whose header
has no end: uvicorn limits the time between requests, and neither time nor bytes within a header.
"""

from __future__ import annotations

import math
import os
import time
from types import FrameType
from typing import Final
from weakref import WeakKeyDictionary

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from veilhead_protocol.hardening import forbid_core_dumps
from veilhead_service.settings import Settings
from veilhead_service.workers import WorkerPool

#: Of uvicorn's ticks, ten a second, every so many looks for connections that stall.
_TICKS: Final = 5

#: Bytes of a request's header, after the piece that it begins in.
_HEADER_BYTES: Final = 64 * 2**10


class _Connection(HttpToolsProtocol):
    """A connection that holds a bounded amount of what is neither a whole header nor a body."""

    _held_bytes = 0
    _is_passed_on = False

    def data_received(self, data: bytes) -> None:
        """Parse a piece of a request, or refuse it."""
        self._is_passed_on = False
        super().data_received(data)
        # Trailers and extensions of chunks count like headers: the parser keeps them, too.
        self._held_bytes = 0 if self._is_passed_on else self._held_bytes + len(data)
        if self._held_bytes > _HEADER_BYTES:
            self.send_400_response("Invalid HTTP request received.")

    def on_headers_complete(self) -> None:
        """The header is whole."""
        self._is_passed_on = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body goes to the application."""
        self._is_passed_on = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._is_passed_on = True
        super().on_message_complete()


class _Server(uvicorn.Server):
    """Uvicorn's server, which drains the pool before it closes the listener."""

    def __init__(self, config: uvicorn.Config, pool: WorkerPool, settings: Settings) -> None:
        super().__init__(config)
        self._pool = pool
        self._delay_seconds = settings.drain_delay_seconds
        self._header_seconds = settings.body_seconds
        self._closes: float | None = None
        # When a connection was first seen without a whole header, and the request before that.
        self._stalled: WeakKeyDictionary[_Connection, tuple[RequestResponseCycle | None, float]]
        self._stalled = WeakKeyDictionary()

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
            self._close_stalled()
        return await super().on_tick(counter)

    def _close_stalled(self) -> None:
        now = time.monotonic()
        for connection in list(self.server_state.connections):
            if not isinstance(connection, _Connection):
                continue
            last = connection.cycle
            # Between requests uvicorn's own timer runs; during one the intake's, or the pool's.
            waits = last is None or last.response_complete
            if not waits or connection.timeout_keep_alive_task is not None:
                self._stalled.pop(connection, None)
                continue
            before, since = self._stalled.get(connection, (last, now))
            if before is not last:
                since = now
            self._stalled[connection] = last, since
            if now - since >= self._header_seconds:
                connection.transport.close()


def serve(app: FastAPI, settings: Settings, *, host: str, port: int) -> None:
    """Serve an app that `create_app` made, in this process, until a signal ends it."""
    forbid_core_dumps()
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_config=None,  # `logs.configure` did it
        http=_Connection,
        proxy_headers=False,  # nothing here asks for a client's address
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
    )
    _Server(config, app.state.services.pool, settings).run()
