"""Coefficients -> SEAL plaintexts, in a time that does not depend on the coefficients.

SEAL's encoder branches on signs and on fractions, its number-theoretic transform on residues, and
arithmetic on subnormal numbers is slow: zeros encode measurably faster than an embedding. So what
is encoded is the sum of the coefficients and of two random masks, out of a table whose encodings
were made ahead, and these are subtracted again: every value that SEAL sees is then positive, of one
magnitude, with a random fraction and random residues.

The masks hide values from a clock, and from nothing else: no secrecy of a message rests on them.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from veilhead_protocol import seal_io
from veilhead_protocol.encoding import encode
from veilhead_protocol.parameters import ParameterSet

#: Masks in a table: of two at a time there are so many that no branch predictor learns them.
_MASKS: Final = 32

#: Of the fractions of a mask: with two of them the rounding adds at most 0.1 to the variance of a
#: coefficient's error, which is what `plan_scales` counts for it.
_FRACTION: Final = 0.1


@dataclass(frozen=True)
class _Mask:
    """Coefficients in [1, 2), [N], and the SEAL plaintext of minus their nearest integers."""

    coefficients: NDArray[np.float64]
    negated: Any


@lru_cache(maxsize=4)
def _masks(parameters: ParameterSet, scale_bits: int) -> list[_Mask]:
    seal, generator = seal_io.runtime(parameters), np.random.default_rng()
    degree, unit = parameters.poly_modulus_degree, 2.0**-scale_bits
    found = []
    for _ in range(_MASKS):
        integers = generator.integers(1 << scale_bits, 2 << scale_bits, size=degree)
        whole = integers.astype(np.float64) * unit
        fractions = generator.uniform(-_FRACTION, _FRACTION, size=degree) * unit
        found.append(_Mask(whole + fractions, encode(seal, -whole, scale_bits)))
    return found


def encode_evenly(
    seal: seal_io.Runtime, coefficients: NDArray[np.float64], scale_bits: int
) -> tuple[Any, Any, Any]:
    """SEAL plaintexts (NTT form, data level) that add up to coefficients * 2^scale_bits, [N].

    Each coefficient is rounded to one of the two nearest integers. The time is even for
    coefficients in [-1, 1] that hold no subnormal numbers.
    """
    masks = _masks(seal.parameters, scale_bits)
    one, other = secrets.choice(masks), secrets.choice(masks)
    masked = coefficients + one.coefficients + other.coefficients
    return encode(seal, masked, scale_bits), one.negated, other.negated
