"""Subnormal numbers count as zero, on a thread and on those that it starts.

A processor takes a hundred times as long for them. A backbone can make some wherever a text has a
property of its author's choice, and so tell of it by the time until the request. torch has
`set_flush_denormal`, which is for one thread, and ONNX Runtime an option that leaves out the thread
which calls it: both compute on the calling thread too. So the processor is told, through the C
library: the flags are in its floating-point environment, and new threads take them over.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Final

#: Where the flags are in `fenv_t`, in bytes, and which these are. x86-64: MXCSR, flush-to-zero and
#: denormals-are-zero (Intel SDM volume 1, 10.2.3). AArch64: FPCR, FZ (Arm ARM, C5.2.8). The layouts
#: are those of glibc and musl, in bits/fenv.h.
_FLAGS: Final = {"x86_64": (28, 0x8040), "aarch64": (0, 1 << 24)}

#: More than any `fenv_t`.
_ROOM: Final = 256


def flush_subnormals() -> bool:
    """Let this thread, and those that it starts from now on, take subnormal numbers for zero.

    Returns:
        Whether that is so. Elsewhere than on Linux on these processors nothing is changed.
    """
    if not sys.platform.startswith("linux") or platform.machine() not in _FLAGS:
        return False
    place, flags = _FLAGS[platform.machine()]
    try:
        library = ctypes.CDLL("libm.so.6")
    except OSError:  # of musl it is part of the C library
        library = ctypes.CDLL(None)
    environment = ctypes.create_string_buffer(_ROOM)
    if library.fegetenv(environment) != 0:
        return False
    word = ctypes.c_uint32.from_buffer(environment, place)
    word.value |= flags
    return bool(library.fesetenv(environment) == 0)
