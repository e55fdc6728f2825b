"""Where requests begin and end on a connection, and what is none.

A parser of its own looks at the bytes before the server's does, by the same library, so that what
the server gets is bounded, and can be read in one way only.
"""

from __future__ import annotations

import re
from collections import deque
from enum import StrEnum
from typing import Final

import httptools

#: Requests of one connection that may wait for the answers before theirs.
MAX_PIPELINED: Final = 16

#: Bytes in a row that are neither a whole header nor a body: a header, trailers, chunk extensions.
#: One piece that is read from a socket may come on top.
_HEADER_BYTES: Final = 32 * 2**10

#: Fields of a header and its trailers.
_MAX_FIELDS: Final = 128

#: RFC 9112, 3.2: no Host but `uri-host [":" port]` of RFC 3986.
_HOST: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]{0,5})?")

#: RFC 9112, 3.2.1 and 3.2.2: a path, or a whole URL as proxies are sent. A fragment is never sent.
_ORIGIN: Final = re.compile(rb"/[!-\"$-~]*")
_ABSOLUTE: Final = re.compile(rb"(?i:https?)://([!-\"$-.0->@-~]+)(?:[/?][!-\"$-~]*)?")


class Refusal(StrEnum):
    """Why the server closes a connection that has not asked for it."""

    MALFORMED = "malformed-request"
    PIPELINED = "too-many-pipelined"
    CROWDED = "too-many-connections"
    STALLED = "stalled"
    FLOODED = "unwanted-body"


class FramingError(Exception):
    """Bytes after which a connection cannot go on."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.value)
        self.refusal = refusal


class Framing:
    """What is under way on one connection, as far as its bytes say.

    Attributes:
        heads: of each request whose answer nobody has begun, the number of its header fields.
            Trailers are not among them.
        between: whether no request is partly here.
    """

    def __init__(self) -> None:
        self.heads: deque[int] = deque()
        self.between = True
        self._parser = httptools.HttpRequestParser(self)
        self._held = 0
        self._moved = False
        self._in_head = False
        self._fields = 0
        self._target = b""
        self._hosts: list[bytes] = []
        self._codings: list[bytes] = []

    def feed(self, data: bytes) -> None:
        """Look at a piece of what was received.

        Raises:
            FramingError: when it is no HTTP/1, could be read in two ways, or is too much. No
                request of the piece is then among `heads`.
        """
        before = len(self.heads)
        self._moved = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The request is answered as any other; what follows it could be of either protocol.
            if upgrade.args[0] != len(data):
                self._forget(before)
                raise FramingError(Refusal.MALFORMED) from None
        except httptools.HttpParserError as error:
            self._forget(before)
            found = error.__context__
            refused = found if isinstance(found, FramingError) else None
            raise refused or FramingError(Refusal.MALFORMED) from None
        self._held = 0 if self._moved else self._held + len(data)
        if self._held > _HEADER_BYTES:
            self._forget(before)
            raise FramingError(Refusal.MALFORMED)

    def _forget(self, before: int) -> None:
        while len(self.heads) > before:
            self.heads.pop()

    # --- called by the parser ---------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self.between = False
        self._in_head = True
        self._fields = 0
        self._target = b""
        self._hosts = []
        self._codings = []

    def on_url(self, part: bytes) -> None:
        """A part of the target."""
        self._target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the header, or of the trailers."""
        self._fields += 1
        if self._fields > _MAX_FIELDS:
            raise FramingError(Refusal.MALFORMED)
        # By length first: every query's fields come by here.
        if len(name) == 4 and self._in_head and name.lower() == b"host":
            self._hosts.append(value)
        elif len(name) == 17 and self._in_head and name.lower() == b"transfer-encoding":
            self._codings.append(value)

    def on_headers_complete(self) -> None:
        """The header is whole."""
        version = self._parser.get_http_version()
        if version not in ("1.0", "1.1") or not self._is_addressed(version):
            raise FramingError(Refusal.MALFORMED)
        # RFC 9112, 6.1: the last coding is `chunked`, and there is none in HTTP/1.0.
        if self._codings:
            is_chunked = [coding.lower() for coding in self._codings] == [b"chunked"]
            if version == "1.0" or not is_chunked:
                raise FramingError(Refusal.MALFORMED)
        if len(self.heads) > MAX_PIPELINED:
            raise FramingError(Refusal.PIPELINED)
        self._in_head = False
        self._moved = True
        self.heads.append(self._fields)

    def on_body(self, body: bytes) -> None:  # noqa: ARG002
        """A piece of the body."""
        self._moved = True

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._moved = True
        self.between = True

    def _is_addressed(self, version: str) -> bool:
        """Whether target and Host name one place, as RFC 9112, 3.2 and 3.3 want it."""
        if len(self._hosts) != 1 and not (version == "1.0" and not self._hosts):
            return False
        if self._hosts and not _HOST.fullmatch(self._hosts[0]):
            return False
        if self._target == b"*":
            return self._parser.get_method() == b"OPTIONS"
        absolute = _ABSOLUTE.fullmatch(self._target)
        if absolute is not None:
            return self._hosts[:1] in ([], [absolute[1]])
        return _ORIGIN.fullmatch(self._target) is not None
