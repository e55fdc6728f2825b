"""The words of SEAL's arrays, read where they lie.

TenSEAL's binding gives residues one at a time, or compressed in a file: either takes longer than
the arithmetic on them. Where they lie is known to pybind11 and to SEAL, and whether it is as
described here is tried once, on known values, in a way that cannot crash. Where it is not, words
are read one at a time. Nothing is ever written here.

Sources: pybind11 2.x and 3.x, `instance` in pybind11/detail/common.h (after the object's head comes
a pointer to the value); SEAL 4.3, `DynArray` in native/src/seal/dynarray.h (a memory pool handle of
two words, the capacity, the size, the address of the first element).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tenseal import sealapi

_Read = Callable[[int, int], bytes]

_POINTER: Final = struct.Struct("<Q")
_ARRAY: Final = struct.Struct("<24xQQ")  # pool handle and capacity, size, first element
_HEAD_BYTES: Final = object.__basicsize__
_WORD: Final = np.dtype("<u8")


def read_array(owner: Any, count: int) -> NDArray[np.uint64]:
    """A copy of the words [count] of a SEAL ciphertext or plaintext.

    Raises:
        AssertionError: when there is another number of words.
    """
    if _IN_PLACE:
        return _words(owner, count, ctypes.string_at)
    array = owner.dyn_array()
    _check(array.size(), count)
    return np.fromiter(map(array.at, range(count)), dtype=_WORD, count=count)


def is_readable() -> bool:
    """Whether arrays lie where they are expected."""
    known = [7, 5, 3]  # any values, lowest power first
    plaintext = sealapi.Plaintext("3x^2 + 5x^1 + 7")
    try:
        memory = os.open("/proc/self/mem", os.O_RDONLY)
    except OSError:
        return False
    try:
        # Through the kernel, which answers a wrong address with an error.
        found = _words(plaintext, len(known), lambda start, size: os.pread(memory, size, start))
    except (OSError, OverflowError, ValueError, struct.error, AssertionError):
        return False
    finally:
        os.close(memory)
    return bool((found == known).all())


def _words(owner: Any, count: int, read: _Read) -> NDArray[np.uint64]:
    array = owner.dyn_array()  # lies inside its owner, and does not keep it alive
    (value,) = _POINTER.unpack(read(id(array) + _HEAD_BYTES, _POINTER.size))
    size, first = _ARRAY.unpack(read(value, _ARRAY.size))
    _check(size, count)
    return np.frombuffer(read(first, _WORD.itemsize * count), dtype=_WORD)


def _check(size: int, count: int) -> None:
    if size != count:
        raise AssertionError(f"a SEAL array holds {size} words, expected {count}")


# On import, since a worker forbids core dumps, and then may not open its own memory to find out.
_IN_PLACE: Final = is_readable()
