"""Coefficients <-> slots <-> SEAL plaintexts.

SEAL's CKKS encoder takes slots: slot i is the value of the polynomial at zeta^(3^i mod 2N), with
zeta = exp(i pi / N). The protocol thinks in coefficients, so they are evaluated there first.
Source: SEAL 4.3, `CKKSEncoder` in native/src/seal/ckks.h (generator 3).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veilhead_protocol.seal_io import Runtime


@lru_cache(maxsize=4)
def _tables(degree: int) -> tuple[NDArray[np.complex128], NDArray[np.intp]]:
    """The twist exp(i pi j / N), [N], and for each slot the odd power it reads, [N / 2]."""
    twist = np.exp(1j * np.pi * np.arange(degree) / degree)
    power, index = 1, np.empty(degree // 2, dtype=np.intp)
    for slot in range(degree // 2):
        index[slot] = (power - 1) // 2
        power = power * 3 % (2 * degree)
    return twist, index


def coefficients_to_slots(coefficients: NDArray[np.float64]) -> NDArray[np.complex128]:
    """Coefficients [..., N] to slots [..., N / 2]."""
    degree = coefficients.shape[-1]
    twist, index = _tables(degree)
    values: NDArray[np.complex128] = np.fft.ifft(coefficients * twist, axis=-1) * degree
    return values[..., index]


def slots_to_coefficients(slots: NDArray[np.complex128]) -> NDArray[np.float64]:
    """Slots [..., N / 2] to coefficients [..., N]; the inverse of `coefficients_to_slots`."""
    degree = 2 * slots.shape[-1]
    twist, index = _tables(degree)
    values = np.empty((*slots.shape[:-1], degree), dtype=np.complex128)
    values[..., index] = slots
    values[..., degree - 1 - index] = np.conj(slots)  # the conjugate power is 2N - p
    coefficients: NDArray[np.float64] = (np.fft.fft(values, axis=-1) / degree * np.conj(twist)).real
    return coefficients


def encode(runtime: Runtime, coefficients: NDArray[np.float64], scale_bits: int) -> Any:
    """A SEAL plaintext (NTT form) of rint(coefficients * 2^scale_bits), [N].

    Where a scaled coefficient passes 2^48 the double-precision FFT moves others by a few units.
    """
    plaintext = runtime.new_plaintext()
    slots = coefficients_to_slots(coefficients).tolist()
    runtime.encoder.encode(slots, runtime.parms_id, 2.0**scale_bits, plaintext)
    return plaintext


def decode(runtime: Runtime, plaintext: Any) -> NDArray[np.float64]:
    """Coefficients [N] of a SEAL plaintext, divided by its scale."""
    slots = np.array(runtime.encoder.decode_complex(plaintext), dtype=np.complex128)
    return slots_to_coefficients(slots)
