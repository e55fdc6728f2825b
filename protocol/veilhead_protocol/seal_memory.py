"""The words of SEAL's arrays, read where they lie.

TenSEAL's binding gives residues one at a time, or compressed in a file: either takes longer than
the arithmetic on them. Where they lie is known to pybind11 and to SEAL, and whether it is as
described here is tried once, on known values, in a way that cannot crash. Where it is not, words
are read one at a time. Nothing is ever written here.

Sources: pybind11 2.x and 3.x, `instance` in pybind11/detail/common.h (after the object's head comes
a pointer to the value); SEAL 4.3, `DynArray` in native/src/seal/dynarray.h (a memory pool handle of
two words, the capacity, the size, the address of the first element), `Ciphertext` in ciphertext.h
(its members and then such an array) and `Serializable` in serializable.h (nothing but what it
holds), `encrypt_zero_symmetric` in util/rlwe.cpp (a seeded ciphertext has, where its second half
would begin, a word of ones, and then what SEAL writes of the generator and the seed).
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

#: In a seeded ciphertext, before what makes its second half.
_SEED_MARK: Final = b"\xff" * 8
#: More than any ciphertext here has in one half: a size that is none is not believed.
_MOST_WORDS: Final = 2**16

_POINTER: Final = struct.Struct("<Q")
_ARRAY: Final = struct.Struct("<24xQQ")  # pool handle and capacity, size, first element
#: parms_id, whether in NTT form, number of polynomials, N, L, scale, correction; then the array.
_CIPHERTEXT: Final = struct.Struct("<32x?7xQQQ16x24xQQ")
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


def read_seeded(serializable: Any, info_bytes: int) -> tuple[NDArray[np.uint64], bytes]:
    """Copies of c0 [N] of a seeded SEAL ciphertext and of its seed information.

    Only where `seeded_is_readable` has found what is expected.

    Raises:
        AssertionError: when it is not one in NTT form.
    """
    return _seeded(serializable, info_bytes, ctypes.string_at)


def seeded_is_readable(serializable: Any, c0: NDArray[np.uint64], info: bytes) -> bool:
    """Whether a seeded ciphertext lies where it is expected: this one, that holds what is known."""

    def found(read: _Read) -> bool:
        words, seed = _seeded(serializable, len(info), read)
        return np.array_equal(words, c0) and seed == info

    return _IN_PLACE and _tried(found)


def _seeded(serializable: Any, info_bytes: int, read: _Read) -> tuple[NDArray[np.uint64], bytes]:
    (value,) = _POINTER.unpack(read(id(serializable) + _HEAD_BYTES, _POINTER.size))
    members = _CIPHERTEXT.unpack(read(value, _CIPHERTEXT.size))
    ntt_form, polynomials, degree, primes, size, first = members
    half = degree
    if not ntt_form or primes != 1 or (polynomials, size) != (2, 2 * half) or half > _MOST_WORDS:
        raise AssertionError("a seeded SEAL ciphertext has another shape or form than expected")
    c0_bytes = _WORD.itemsize * half
    # Nothing after the seed is initialised, so nothing of it is read.
    second = read(first + c0_bytes, len(_SEED_MARK) + info_bytes)
    if not second.startswith(_SEED_MARK):
        raise AssertionError("a seeded SEAL ciphertext has no seed where it is expected")
    words = np.frombuffer(read(first, c0_bytes), dtype=_WORD)
    return words, second[len(_SEED_MARK) :]


def is_readable() -> bool:
    """Whether arrays lie where they are expected."""
    known = [7, 5, 3]  # any values, lowest power first
    plaintext = sealapi.Plaintext("3x^2 + 5x^1 + 7")
    return _tried(lambda read: bool((_words(plaintext, len(known), read) == known).all()))


def _tried(found: Callable[[_Read], bool]) -> bool:
    """What is found through the kernel, which answers a wrong address with an error."""
    try:
        memory = os.open("/proc/self/mem", os.O_RDONLY)
    except OSError:
        return False
    try:
        return found(lambda start, size: os.pread(memory, size, start))
    except (OSError, OverflowError, ValueError, struct.error, AssertionError):
        return False
    finally:
        os.close(memory)


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
