"""Parameter sets: the two there are, and no way to make an unsafe one."""

from __future__ import annotations

import hashlib
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from tenseal import sealapi

from veilhead_protocol import seal_io
from veilhead_protocol.errors import ParameterError, ScaleError
from veilhead_protocol.parameters import (
    COMPACT,
    MAX_MODULUS_BITS,
    MAX_SERVED_EXPONENT,
    PARAMETER_SETS,
    STANDARD,
    ParameterSet,
    parameter_set,
)

both_sets = pytest.mark.parametrize("parameters", PARAMETER_SETS.values(), ids=lambda p: p.name)


def test_ids_never_change() -> None:
    assert STANDARD.id.hex() == "ccf9c15dc6e6ed7e3b72fc28fa85d88b8faf5964db7d0fcd546e8b8a78651ef6"
    assert COMPACT.id.hex() == "e8be5c106c7939a3890c0f21a923309ed3cd81ccd7de2c0b77ef591331bdb412"
    for parameters in PARAMETER_SETS.values():
        assert hashlib.sha256(parameters.canonical_form).digest() == parameters.id


def test_the_canonical_form() -> None:
    assert STANDARD.canonical_form == (
        b"veilhead-parameters 2\nscheme=ckks\ndegree=4096\nprime=0x1ffffffffb4001\n"
        b"secret=ternary\nerror=cbd21\n"
    )
    assert COMPACT.canonical_form == (
        b"veilhead-parameters 2\nscheme=ckks\ndegree=2048\nprime=0x3ffffffffc001\n"
        b"secret=ternary\nerror=cbd21\n"
    )


def test_both_sets_meet_the_published_limits() -> None:
    """HomomorphicEncryption.org 2018: 54 and 109 bits; ePrint 2024/463: 53 and 106 bits."""
    bits = {p.poly_modulus_degree: p.residue_bits for p in PARAMETER_SETS.values()}
    assert bits == {2048: 50, 4096: 53}
    assert MAX_MODULUS_BITS == {2048: 53, 4096: 106}


def is_prime(number: int) -> bool:
    """Miller and Rabin's test; the first twelve primes decide every number below 3.1 10^23.

    Source: Sorenson and Webster, "Strong pseudoprimes to twelve prime bases", 2015.
    """
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        power = pow(base, odd, number)
        if power not in (1, number - 1) and all(
            pow(power, 1 << square, number) != number - 1 for square in range(1, twos)
        ):
            return False
    return True


def test_the_test_of_primes_can_fail() -> None:
    assert [n for n in range(41, 101, 2) if is_prime(n)] == [
        41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97,
    ]  # fmt: skip
    assert is_prime(2**61 - 1)
    assert not is_prime(3825123056546413051)  # which fools the first eleven
    assert not is_prime((2**31 - 1) * (2**19 - 1))


@both_sets
def test_primes_are_the_largest_of_their_size(parameters: ParameterSet) -> None:
    """Of all that are 1 modulo 2N: nobody chose them for anything else."""
    bits, step = parameters.residue_bits, 2 * parameters.poly_modulus_degree
    candidates = range((1 << bits) - step + 1, 1 << (bits - 1), -step)
    assert next(number for number in candidates if is_prime(number)) == parameters.prime


@both_sets
def test_seal_agrees(parameters: ParameterSet) -> None:
    """SEAL checks the prime and its own table for 128 bits."""
    seal = seal_io.runtime(parameters)
    assert seal.context.parameters_set()
    assert seal.context.parameters_error_name() == "success"
    data = seal.context.first_context_data()
    assert data.qualifiers().sec_level == sealapi.SEC_LEVEL_TYPE.TC128
    assert data.qualifiers().using_ntt
    assert sealapi.Modulus(parameters.prime).is_prime()
    # One prime: keys, queries and replies have one level.
    assert seal.context.key_parms_id() == seal.context.first_parms_id() == seal.parms_id
    assert seal.context.last_parms_id() == seal.parms_id
    (modulus,) = data.parms().coeff_modulus()
    assert modulus.value() == parameters.prime


@pytest.mark.parametrize(
    "change",
    [
        {"prime": 0x3FFFFFFFFC1001},  # 54 bits
        {"prime": (1 << 60) - 2**12 + 1},
        {"prime": COMPACT.prime + 2},  # not 1 modulo 2N
        {"prime": COMPACT.prime - 2048},
        {"poly_modulus_degree": 1024},
        {"poly_modulus_degree": 8192},
        {"poly_modulus_degree": 2047},
        {"poly_modulus_degree": 0},
        {"poly_modulus_degree": -2048},
    ],
    ids=str,
)
def test_unsafe_variations_of_compact_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        replace(COMPACT, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"prime": 0x3FFFFFFFF80001},  # 54 bits, which doubles do not hold
        {"prime": STANDARD.prime - 4096},
        {"poly_modulus_degree": 8192},
    ],
    ids=str,
)
def test_unsafe_variations_of_standard_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        replace(STANDARD, **change)


def test_safe_variations_are_possible() -> None:
    """The refusals above are not refusals of everything."""
    for parameters in (COMPACT, STANDARD):
        smaller = replace(parameters, name="small", prime=0xFFFFEE001)
        assert smaller.id != parameters.id


def test_sets_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        COMPACT.poly_modulus_degree = 1024  # type: ignore[misc]


def test_names() -> None:
    assert parameter_set("compact") is COMPACT
    assert parameter_set("standard") is STANDARD
    for name in ("", "Compact", "strong", "insecure", "x" * 1000):
        with pytest.raises(ParameterError) as raised:
            parameter_set(name)
        assert len(str(raised.value)) < 200


def test_minimum() -> None:
    assert STANDARD.at_least(COMPACT)
    assert STANDARD.at_least(STANDARD)
    assert COMPACT.at_least(COMPACT)
    assert not COMPACT.at_least(STANDARD)


def test_most_wanted_coefficients() -> None:
    """w (e + 11) <= 2,900 in `standard` and 1,152 in `compact`, e as it is served."""
    for parameters, hints in ((STANDARD, 2900), (COMPACT, 1152)):
        for exponent in range(MAX_SERVED_EXPONENT + 1):
            most = parameters.max_wanted(exponent)
            assert most * (exponent + 11) <= hints < (most + 1) * (exponent + 11)
        for exponent in (-1, MAX_SERVED_EXPONENT + 1):
            with pytest.raises(ScaleError):
                parameters.max_wanted(exponent)
