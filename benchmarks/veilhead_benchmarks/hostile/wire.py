"""Requests as bytes on a connection, and the answers that come back.

The reader is strict, and shares no code with the service's.
"""

from __future__ import annotations

import re
import socket
import time
from dataclasses import dataclass, field
from typing import Final, Self
from urllib.parse import unquote

#: An answer that takes longer counts as none.
ANSWER_SECONDS: Final = 10.0

#: The host that requests name, unless they name another.
HOST: Final = b"x"

_PLAIN_METHODS: Final = frozenset({"GET", "PUT", "POST", "HEAD", "DELETE", "PATCH", "OPTIONS"})
_PLAIN_TARGET: Final = re.compile(r"/[!-\"$-~]*")
_PLAIN_VALUE: Final = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")

#: Headers that change how a request is read.
_FRAMING: Final = frozenset({
    b"host", b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"expect", b"te",
})  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        method: an HTTP method, or a word that is none.
        target: the path as it is sent, percent-encoded.
        query: what stands after the question mark.
        headers: names in lower case.
        pieces: the body, as it is sent.
        ending: `complete`, or what the connection does instead: `disconnect` or `stall`.
    """

    method: str
    target: str
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    pieces: tuple[bytes, ...] = ()
    ending: str = "complete"

    @property
    def path(self) -> str:
        """The path as a server decodes it."""
        return unquote(self.target)

    @property
    def body(self) -> bytes:
        """All of the body."""
        return b"".join(self.pieces)

    @property
    def is_plain(self) -> bool:
        """Whether it is HTTP that every server must read, and in one way."""
        whole = self.target + self.query.decode("latin-1")
        return (
            self.method in _PLAIN_METHODS
            and _PLAIN_TARGET.fullmatch(whole) is not None
            and not any(name in _FRAMING for name, _ in self.headers)
            and all(_PLAIN_VALUE.fullmatch(value) for _, value in self.headers)
        )

    def head(self) -> bytes:
        """The bytes before the body."""
        target = self.target.encode("latin-1", "replace")
        line = self.method.encode("latin-1") + b" " + target
        line += (b"?" + self.query if self.query else b"") + b" HTTP/1.1"
        names = {name for name, _ in self.headers}
        fields = list(self.headers)
        if b"host" not in names:
            fields.insert(0, (b"host", HOST))
        if self.pieces and not names & {b"content-length", b"transfer-encoding"}:
            # Whoever stops within a body has said that it is longer.
            missing = 0 if self.ending == "complete" else 1000
            fields.append((b"content-length", str(len(self.body) + missing).encode()))
        return b"\r\n".join([line, *(name + b": " + value for name, value in fields), b"", b""])

    def __str__(self) -> str:
        sent = f"{self.method} {self.target[:120]}"
        return f"{sent}, {len(self.headers)} headers, a body of {len(self.body)} bytes"


@dataclass
class Answer:
    """What the service sent."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class UnreadableError(Exception):
    """What came is no HTTP answer, or breaks off within one."""


class NoAnswerError(Exception):
    """The connection ended, or time ran out, before an answer began."""


class Connection:
    """A connection to the service, from an address of the loopback net."""

    def __init__(self, port: int, *, address: str = "127.0.0.1", small: bool = False) -> None:
        self._socket = socket.socket()
        if small:  # so that what is not read fills up soon
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.settimeout(ANSWER_SECONDS)
        self._socket.bind((address, 0))
        self._socket.connect(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._held = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def send(self, data: bytes) -> bool:
        """Send it all; False when the other side has ended the connection."""
        self._socket.settimeout(ANSWER_SECONDS)
        try:
            self._socket.sendall(data)
        except OSError:
            return False
        return True

    def send_request(self, request: Request) -> None:
        """Send a request as it wants to be sent."""
        pieces = [piece for piece in request.pieces if piece]
        first = request.head() + (pieces[0] if pieces else b"")
        for piece in [first, *pieces[1:]]:
            if not self.send(piece):
                return
        if request.ending == "disconnect":
            self.end_sending()

    def end_sending(self) -> None:
        """Send no more, and read on."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def push(self, data: bytes, seconds: float, most: int) -> int:
        """Send the same bytes for so long, reading nothing; how many bytes went."""
        self._socket.settimeout(0.05)
        sent, deadline = 0, time.monotonic() + seconds
        while sent < most and time.monotonic() < deadline:
            try:
                sent += self._socket.send(data[sent % len(data) :])
            except TimeoutError:
                continue
            except OSError:
                break
        return sent

    def _more(self) -> bool:
        try:
            piece = self._socket.recv(2**18)
        except TimeoutError:
            raise NoAnswerError("time ran out") from None
        except OSError:
            piece = b""
        self._held += piece
        return bool(piece)

    def read(self, *, to_head: bool = False, seconds: float = ANSWER_SECONDS) -> Answer:
        """The next answer.

        Raises:
            NoAnswerError: when none begins.
            UnreadableError: when it is none.
        """
        self._socket.settimeout(seconds)
        while b"\r\n\r\n" not in self._held:
            if not self._more():
                if self._held:
                    raise UnreadableError("the connection ended within a header")
                raise NoAnswerError("the connection ended")
        head, _, self._held = self._held.partition(b"\r\n\r\n")
        line, *fields = head.split(b"\r\n")
        found = re.fullmatch(rb"HTTP/1\.1 ([1-5][0-9]{2}) [ -~]*", line)
        if found is None:
            raise UnreadableError("there is no status line")
        answer = Answer(int(found[1]))
        for item in fields:
            name, colon, value = item.partition(b": ")
            if not colon or not re.fullmatch(rb"[a-z0-9-]+", name.lower()):
                raise UnreadableError("there is no header field")
            answer.headers[name.decode().lower()] = value.decode("latin-1")
        if answer.status < 200:
            return self.read(to_head=to_head, seconds=seconds)
        # What the service cannot read has no method, so that its 400 has a body in any case.
        if answer.status == 400 or not (to_head or answer.status in (204, 304)):
            length = answer.headers.get("content-length", "")
            if not length.isdigit():
                raise UnreadableError("an answer does not say how long it is")
            while len(self._held) < int(length):
                if not self._more():
                    raise UnreadableError("the connection ended within a body")
            answer.body, self._held = self._held[: int(length)], self._held[int(length) :]
        return answer

    def is_ended(self) -> bool:
        """Whether the other side has ended the connection; does not wait, and throws away."""
        self._socket.setblocking(False)
        try:
            while self._socket.recv(2**18):
                continue
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True
