"""Frames between the service and its workers: parts of bytes, each with its length.

Both ends are ours and the socket is private to them, so a malformed frame is a bug, not an attack.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

COUNT: Final = struct.Struct("<B")
LENGTH: Final = struct.Struct("<I")

#: The first frame to a worker: the key of encrypted heads, or nothing. It goes over the socket, as
#: arguments and environment of a process can be read by others of its user.
CONFIGURE: Final = b"configure"

#: What a worker is asked for, or answers: the first part of a frame.
EVALUATE: Final = b"evaluate"
READY: Final = b"ready"
REPLY: Final = b"reply"
REFUSED: Final = b"refused"
FAILED: Final = b"failed"


def write(parts: Sequence[bytes]) -> bytes:
    """The bytes of a frame."""
    lengths = b"".join(LENGTH.pack(len(part)) for part in parts)
    return b"".join([COUNT.pack(len(parts)), lengths, *parts])
