"""Coefficients and slots, against SEAL's own encoder and decoder."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veilhead_protocol import seal_io
from veilhead_protocol.encoding import (
    coefficients_to_slots,
    decode,
    encode,
    slots_to_coefficients,
)
from veilhead_protocol.parameters import COMPACT, PARAMETER_SETS, ParameterSet

SETS = st.sampled_from(list(PARAMETER_SETS.values()))


@given(SETS, st.integers(0, 2**32))
def test_slots_and_back(parameters: ParameterSet, seed: int) -> None:
    degree = parameters.poly_modulus_degree
    coefficients = np.random.default_rng(seed).normal(size=(2, degree))
    slots = coefficients_to_slots(coefficients)
    assert slots.shape == (2, degree // 2)
    assert np.abs(slots_to_coefficients(slots) - coefficients).max() < 1e-10


@pytest.mark.parametrize("parameters", PARAMETER_SETS.values(), ids=lambda p: p.name)
def test_slots_are_values_at_powers_of_three(parameters: ParameterSet) -> None:
    degree = parameters.poly_modulus_degree
    coefficients = np.random.default_rng(1).normal(size=degree)
    slots = coefficients_to_slots(coefficients)
    for slot in (0, 1, 7, degree // 2 - 1):
        angle = np.pi / degree * pow(3, slot, 2 * degree)
        value = (coefficients * np.exp(1j * angle * np.arange(degree))).sum()
        assert abs(value - slots[slot]) < 1e-8


@given(SETS, st.integers(0, 2**32), st.integers(20, 40))
def test_seal_encodes_the_rounded_coefficients(
    parameters: ParameterSet, seed: int, bits: int
) -> None:
    """What SEAL's plaintext holds, read back by SEAL, is rint(m 2^bits) / 2^bits."""
    seal = seal_io.runtime(parameters)
    coefficients = np.random.default_rng(seed).uniform(-1, 1, parameters.poly_modulus_degree)
    found = decode(seal, encode(seal, coefficients, bits))
    rounded = np.rint(coefficients * 2.0**bits) / 2.0**bits
    # SEAL rounds after an FFT of its own: a tie or two may go the other way.
    off = np.abs(found - rounded) * 2.0**bits
    assert off.max() < 1.01
    assert (off > 0.01).mean() < 0.01


def test_one_coefficient_becomes_one_power() -> None:
    """The product of encodings of X^a and X^b is X^(a + b), with the sign of the ring."""
    seal = seal_io.runtime(COMPACT)
    degree = COMPACT.poly_modulus_degree
    one = np.zeros((2, degree), dtype=np.uint64)
    for first, second in ((3, 5), (2000, 100), (2047, 1)):
        c0 = np.zeros(degree)
        c0[first] = 1.0
        factor = np.zeros(degree)
        factor[second] = 1.0
        one[1] = 1  # not transparent
        ciphertext = seal_io.load_ciphertext(seal, one, scale_bits=20)
        seal.evaluator.add_plain_inplace(ciphertext, encode(seal, c0, 20))
        seal.evaluator.multiply_plain_inplace(ciphertext, encode(seal, factor, 10))
        seal.evaluator.transform_from_ntt_inplace(ciphertext)
        found = seal_io.save_ciphertext(seal, ciphertext)[0]
        (at,) = np.flatnonzero(found)
        assert at == (first + second) % degree
        sign = 1 if first + second < degree else -1
        assert int(found[at]) == sign * 2**30 % COMPACT.prime
