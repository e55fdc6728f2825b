"""Frames between the service and its workers: parts of bytes, each with its length.

Both ends are ours and the socket is private to them, so a malformed frame is a bug, not an attack.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

COUNT: Final = struct.Struct("<B")
LENGTH: Final = struct.Struct("<I")

#: What a worker is asked for, or answers: the first part of a frame.
EVALUATE: Final = b"evaluate"
#: The key of encrypted heads. It goes over the socket, since other processes of the same user can
#: read a process's arguments and environment.
HEAD_KEY: Final = b"head-key"
READY: Final = b"ready"
REPLY: Final = b"reply"
REFUSED: Final = b"refused"
FAILED: Final = b"failed"


def write(parts: Sequence[bytes]) -> bytes:
    """The bytes of a frame."""
    lengths = b"".join(LENGTH.pack(len(part)) for part in parts)
    return b"".join([COUNT.pack(len(parts)), lengths, *parts])
