"""Connections: how many there are, how long they may wait, and what one of them may hold.

`Connection` stands between a socket and uvicorn's protocol, and knows of the latter what asyncio's
protocols have in public. `Front` stands between uvicorn and the application, and tells the
connection when an answer begins and ends.

The kernel ends a connection whose peer does not take its answer, and bounds what it holds of it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from veilhead_protocol.wire import MAX_QUERY_BYTES
from veilhead_service import problems
from veilhead_service.framing import Framing, FramingError, Refusal
from veilhead_service.pacing import Pacing

#: Where the request's state names its connection, until `Front` takes it out.
_STATE: Final = "veilhead.connection"

#: Bytes of an answer that the kernel holds, at most (it doubles the number). socket(7)
_SEND_BYTES: Final = 128 * 2**10


@dataclass(frozen=True)
class ConnectionLimits:
    """What connections may be.

    Attributes:
        connections: how many there may be.
        peer_connections: how many from one address (of IPv6, from one /64).
        header_seconds: how long a request's header may take, and a new connection's first one.
        unread_seconds: how long a peer may take nothing of its answer.
    """

    connections: int
    peer_connections: int
    header_seconds: float
    unread_seconds: float


@dataclass
class _Peer:
    """The connections of one address, and those that wait for a request, longest first."""

    connections: int = 0
    waiting: dict[Connection, None] = field(default_factory=dict)


class Connections:
    """All connections of a server."""

    def __init__(
        self, limits: ConnectionLimits, pacing: Pacing, note: Callable[[str], None]
    ) -> None:
        """Count connections.

        Args:
            limits: what they may be.
            pacing: when refusals are answered.
            note: is told of every connection that is closed for a reason of the server's.
        """
        self.limits = limits
        self.pacing = pacing
        self.note = note
        self._peers: dict[str, _Peer] = {}
        self._waiting: dict[Connection, None] = {}  # longest first
        self._count = 0
        self.paced = 0  # connections whose refusals wait

    @property
    def may_pace(self) -> bool:
        """Whether another refusal may wait: it holds a connection that others need."""
        return self.paced < self.limits.connections // 4

    def __len__(self) -> int:
        return self._count

    def add(self, connection: Connection) -> bool:
        """Take in a new connection, at the cost of one that waits where there are too many.

        False when none waits: the new one is then to be closed.
        """
        peer = self._peers.get(connection.peer)
        others: dict[Connection, None] | None = None
        if peer is not None and peer.connections >= self.limits.peer_connections:
            others = peer.waiting
        elif self._count >= self.limits.connections:
            # Of the address with the most: who has one or two is not pushed out by a crowd.
            others = max(self._peers.values(), key=lambda one: len(one.waiting)).waiting
        if others is not None:
            self.note(Refusal.CROWDED)
            longest = next(iter(others), None)
            if longest is None:
                return False
            longest.abort()
        self._count += 1
        self._peers.setdefault(connection.peer, _Peer()).connections += 1
        self.wait(connection)
        return True

    def wait(self, connection: Connection) -> None:
        """The connection waits for its next request from now on."""
        self._waiting[connection] = None
        self._peers[connection.peer].waiting[connection] = None

    def work(self, connection: Connection) -> None:
        """The connection has a request to be answered."""
        self._waiting.pop(connection, None)
        self._peers[connection.peer].waiting.pop(connection, None)

    def remove(self, connection: Connection) -> None:
        """The connection has ended."""
        self.work(connection)
        peer = self._peers[connection.peer]
        peer.connections -= 1
        self._count -= 1
        if not peer.connections:
            del self._peers[connection.peer]

    def close_stalled(self) -> None:
        """Close the connections that have waited too long for a header, or for a body's end."""
        before = time.monotonic() - self.limits.header_seconds
        for connection in list(self._waiting):
            if connection.stalled_since <= before:
                self.note(Refusal.STALLED)
                connection.abort()
        self.pacing.forget()


class Connection(asyncio.Protocol):
    """One connection, around uvicorn's protocol of it."""

    def __init__(
        self,
        config: Any,
        server_state: Any,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        connections: Connections,
    ) -> None:
        """As uvicorn makes a protocol, with the connections that it is one of."""
        self.peer = ""
        self.stalled_since = time.monotonic()
        self._gone = asyncio.Event()
        self._connections = connections
        self._counted = False
        self._framing = Framing()
        self._answering = False
        self._refusal: Refusal | None = None
        self._unwanted = 0
        self._transport = cast("asyncio.Transport", None)
        self._inner = HttpToolsProtocol(
            config=config,
            server_state=server_state,
            app_state={**app_state, _STATE: self},
            _loop=_loop,
        )

    # --- called by asyncio ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open; it may be one too many."""
        self._transport = cast("asyncio.Transport", transport)
        self._inner.connection_made(self._transport)
        self.peer = _peer_of(transport.get_extra_info("peername"))
        self._bound(transport.get_extra_info("socket"))
        self._counted = self._connections.add(self)
        if not self._counted:
            self._transport.abort()

    def _bound(self, connection: socket.socket) -> None:
        milliseconds = int(self._connections.limits.unread_seconds * 1000)
        with suppress(OSError):  # it may be closed already
            # tcp(7): also for a peer that lives and takes nothing.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)

    def data_received(self, data: bytes) -> None:
        """Hand a piece of a request on, or refuse it."""
        if self._refusal is not None or not self._counted:
            return
        framing = self._framing
        was_between = framing.between
        was_busy = self._is_busy
        try:
            framing.feed(data)
        except FramingError as error:
            self._refuse(error.refusal)
            return
        if self._is_busy:
            if not was_busy:
                self._connections.work(self)
        elif was_between:
            now = time.monotonic()
            # Line breaks between requests are none, and stop uvicorn's timer.
            self.stalled_since = min(self.stalled_since, now) if framing.between else now
        else:
            self._unwanted += len(data)
            if self._unwanted > MAX_QUERY_BYTES:
                self._refuse(Refusal.FLOODED)
                return
        self._inner.data_received(data)

    def eof_received(self) -> None:
        """The peer sends no more: asyncio closes the connection."""
        self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._uncount()
        self._gone.set()
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """The peer takes nothing for now."""
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """The peer takes more."""
        self._inner.resume_writing()

    # --- called by others -------------------------------------------------------------------------

    def begin_answer(self) -> int:
        """The application answers the next request: the number of its header fields."""
        self._answering = True
        return self._framing.heads.popleft()

    async def pace(self, tenant: str | None, status: int) -> None:
        """Wait until this answer may be sent, or the peer has gone."""
        seconds = self._connections.pacing.take(tenant, self.peer, status)
        if seconds > 0 and self._connections.may_pace:
            self._connections.paced += 1
            try:
                await asyncio.wait_for(self._gone.wait(), seconds)
            except TimeoutError:
                pass
            finally:
                self._connections.paced -= 1

    def end_answer(self) -> None:
        """The application has answered."""
        self._answering = False
        if self._framing.heads:
            return
        if self._refusal is not None:
            self._end()
        elif self._counted:
            self._unwanted = 0
            # Between whole requests uvicorn's own timer runs.
            self.stalled_since = float("inf") if self._framing.between else time.monotonic()
            self._connections.wait(self)

    def abort(self) -> None:
        """End the connection at once; what it has not sent is lost."""
        self._uncount()
        self._transport.abort()

    @property
    def _is_busy(self) -> bool:
        return self._answering or bool(self._framing.heads)

    def _uncount(self) -> None:
        if self._counted:
            self._counted = False
            self._connections.remove(self)

    def _refuse(self, refusal: Refusal) -> None:
        """End the connection once the requests before have their answers."""
        self._refusal = refusal
        self._connections.note(refusal)
        self._transport.pause_reading()
        if not self._is_busy:
            self._end()

    def _end(self) -> None:
        if self._refusal is Refusal.MALFORMED and not self._transport.is_closing():
            self._transport.write(problems.malformed_request())
        self._transport.close()


class Front:
    """Between uvicorn and the application: every answer's begin, end, and pace."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: MutableMapping[str, Any] = scope["state"]
        connection: Connection = state.pop(_STATE)
        # What the parser adds to this list later, or has added already, are trailers.
        scope["headers"] = scope["headers"][: connection.begin_answer()]

        async def send_paced(message: Message) -> None:
            if message["type"] == "http.response.start":
                await connection.pace(state.get("tenant"), message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_paced)
        finally:
            connection.end_answer()


def _peer_of(address: Any) -> str:
    """What counts as one peer: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        found = ipaddress.ip_address(str(address[0]).partition("%")[0])
    except (ValueError, TypeError, IndexError):
        return ""
    if isinstance(found, ipaddress.IPv6Address):
        return str(found.ipv4_mapped or ipaddress.IPv6Address(int(found) >> 64 << 64))
    return str(found)
