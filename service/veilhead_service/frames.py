"""Frames between the service and its workers: parts of bytes, each with its length.

Both ends are ours and the socket is private to them, so a malformed frame is a bug, not an attack.
The header has a fixed size and says how much follows, so that a frame costs two reads.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

#: Number of parts, and bytes after the header.
HEADER: Final = struct.Struct("<BI")

_LENGTH: Final = struct.Struct("<I")

#: What a worker is asked for, or answers: the first part of a frame.
EVALUATE: Final = b"evaluate"
LOAD: Final = b"load"
#: The key of encrypted heads. It goes over the socket, since other processes of the same user can
#: read a process's arguments and environment.
HEAD_KEY: Final = b"head-key"
READY: Final = b"ready"
#: Sent by a worker before its answer when it begins to load a head, and when that has ended, well
#: or not: a worker that dies or hangs in between was loading.
LOADING: Final = b"loading"
LOADED: Final = b"loaded"
REPLY: Final = b"reply"
REFUSED: Final = b"refused"
FAILED: Final = b"failed"


def write(parts: Sequence[bytes]) -> bytes:
    """The bytes of a frame."""
    lengths = b"".join(_LENGTH.pack(len(part)) for part in parts)
    size = len(lengths) + sum(map(len, parts))
    return b"".join([HEADER.pack(len(parts), size), lengths, *parts])


def read(count: int, body: bytes) -> list[bytes]:
    """The parts of a frame, of the header's count and the bytes after it."""
    start = _LENGTH.size * count
    parts = []
    for (length,) in _LENGTH.iter_unpack(body[:start]):
        parts.append(body[start : start + length])
        start += length
    return parts
