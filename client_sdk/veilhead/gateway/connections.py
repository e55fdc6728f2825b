"""Bounds on what a caller's connection may hold and how long, whoever it is.

uvicorn with h11 bounds a request's header, reads no further while a request is answered, and closes
a connection that asks nothing after an answer. What it does not bound is here: how many connections
there are, how long a header may take to come, and how long an answer may wait to be read. Only what
asyncio calls of any protocol is overridden, and the rest is seen as an ASGI application sees it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Final

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

#: Bytes of a header, and of what is parsed of one.
HEADER_BYTES: Final = 64 * 2**10

#: A connection that is accepted or has been answered must bring its next header within this.
HEADER_SECONDS: Final = 10.0

#: An answer that is not taken away for so long is given up.
UNREAD_SECONDS: Final = 10.0


class Guard:
    """The connections of one gateway; an ASGI application in front of its own."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_connections: int,
        header_seconds: float,
        unread_seconds: float,
    ) -> None:
        """Guard `app`.

        Args:
            app: what answers.
            max_connections: connections at once; more are closed as soon as they are accepted.
            header_seconds: how long a connection may be without a request under way.
            unread_seconds: how long an answer may wait to be read.
        """
        self._app = app
        self._max_connections = max_connections
        self._header_seconds = header_seconds
        self.unread_seconds = unread_seconds
        self._timers: dict[Any, asyncio.TimerHandle] = {}  # by the address of the peer
        self._open: dict[Any, asyncio.Transport] = {}

    def protocol(self, *args: Any, **options: Any) -> asyncio.Protocol:
        """A connection's protocol: what uvicorn calls for each one."""
        return _Connection(self, *args, **options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request: its connection is busy meanwhile."""
        peer = scope.get("client")
        self._disarm(peer)
        try:
            await self._app(scope, receive, send)
        finally:
            self._arm(peer)

    def opened(self, peer: Any, transport: asyncio.Transport) -> bool:
        """Take a connection in; False when there are too many, and none of them is idle.

        Of the idle ones, the longest idle of the address with the most makes room.
        """
        if len(self._open) >= self._max_connections:
            idle = [one for one in self._timers if one in self._open]  # longest first
            if not idle:
                return False
            crowd = Counter(str(one[0]) for one in idle).most_common(1)[0][0]
            longest = next(one for one in idle if str(one[0]) == crowd)
            crowded = self._open[longest]
            self.closed(longest)
            crowded.abort()
        self._open[peer] = transport
        self._arm(peer)
        return True

    def closed(self, peer: Any) -> None:
        """Forget a connection."""
        self._disarm(peer)
        self._open.pop(peer, None)

    def _arm(self, peer: Any) -> None:
        transport = self._open.get(peer)
        if transport is not None:
            self._disarm(peer)
            loop = asyncio.get_running_loop()
            self._timers[peer] = loop.call_later(self._header_seconds, transport.abort)

    def _disarm(self, peer: Any) -> None:
        timer = self._timers.pop(peer, None)
        if timer is not None:
            timer.cancel()


class _Connection(H11Protocol):
    """uvicorn's own protocol, which tells the guard when it begins and ends."""

    def __init__(self, guard: Guard, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._guard = guard
        self._peer: Any = None
        self._abort: Any = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, or end at once when there are too many connections."""
        super().connection_made(transport)
        found = transport.get_extra_info("peername")
        self._peer = None if found is None else tuple(found[:2])
        self._abort = transport.abort
        if not self._guard.opened(self._peer, transport):
            self._peer = None
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._stop_waiting()
        if self._peer is not None:
            self._guard.closed(self._peer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The peer does not read: it has so long to begin."""
        super().pause_writing()
        self._stop_waiting()
        loop = asyncio.get_running_loop()
        self._unread = loop.call_later(self._guard.unread_seconds, self._abort)

    def resume_writing(self) -> None:
        """The peer reads."""
        self._stop_waiting()
        super().resume_writing()

    def _stop_waiting(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
        self._unread = None


def guarded(
    app: ASGIApp,
    max_connections: int,
    *,
    header_seconds: float = HEADER_SECONDS,
    unread_seconds: float = UNREAD_SECONDS,
) -> tuple[Guard, dict[str, Any]]:
    """An application behind a guard, and what to configure uvicorn with for it."""
    guard = Guard(
        app,
        max_connections=max_connections,
        header_seconds=header_seconds,
        unread_seconds=unread_seconds,
    )
    return guard, {
        "http": guard.protocol,
        "ws": "none",
        "h11_max_incomplete_event_size": HEADER_BYTES,
        "timeout_keep_alive": 5,
    }
