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
    PARAMETER_SETS,
    STRONG,
    ParameterSet,
    parameter_set,
)

#: 1 modulo 8192, so good for both degrees.
NTT_PRIME_36, NTT_PRIME_35, NTT_PRIME_18 = 0xFFFFEE001, 0x7FFFF6001, 0x2E001


def test_ids_never_change() -> None:
    assert COMPACT.id.hex() == "3ff41c579bec57b18d04fa7bd640a3ba1be7cebd1272995ee10187cc5b9571e0"
    assert STRONG.id.hex() == "6325f40ad49c6aa16dda5f267d61f6c823ed19273d5f52be22b977df2b021d45"
    for parameters in PARAMETER_SETS.values():
        assert hashlib.sha256(parameters.canonical_form).digest() == parameters.id


def test_the_canonical_form() -> None:
    assert STRONG.canonical_form == (
        b"veilhead-parameters 1\nscheme=ckks\ndegree=4096\ndata=0xffffee001,0x7ffff6001\n"
        b"special=0x2e001\nsecret=ternary\nerror=cbd21\n"
    )
    assert COMPACT.canonical_form == (
        b"veilhead-parameters 1\nscheme=ckks\ndegree=2048\ndata=0x1ffffffffe1001\n"
        b"special=\nsecret=ternary\nerror=cbd21\n"
    )


def test_both_sets_meet_the_published_limits() -> None:
    """HomomorphicEncryption.org 2018: 54 and 109 bits; ePrint 2024/463: 53 and 106 bits."""
    bits = {
        parameters.poly_modulus_degree: sum(p.bit_length() for p in parameters.key_primes)
        for parameters in PARAMETER_SETS.values()
    }
    assert bits == {2048: 53, 4096: 89}
    assert MAX_MODULUS_BITS == {2048: 53, 4096: 106}


@pytest.mark.parametrize("parameters", PARAMETER_SETS.values(), ids=lambda p: p.name)
def test_seal_agrees(parameters: ParameterSet) -> None:
    """SEAL checks the primes and its own table for 128 bits."""
    seal = seal_io.runtime(parameters)
    assert seal.context.parameters_set()
    assert seal.context.key_context_data().qualifiers().sec_level == sealapi.SEC_LEVEL_TYPE.TC128
    for prime in parameters.key_primes:
        assert sealapi.Modulus(prime).is_prime()


@pytest.mark.parametrize(
    "change",
    [
        {"data_primes": (0x3FFFFFFFFC1001,)},  # 54 bits
        {"data_primes": (0x1FFFFFFFFE1001 * 2 + 1,)},
        {"data_primes": ((1 << 60) - 2**12 + 1,)},
        {"data_primes": ()},
        {"data_primes": (0x1FFFFFFFFE1001,), "special_prime": NTT_PRIME_18},
        {"data_primes": (NTT_PRIME_18, 0x10001)},  # two, and none special
        {"data_primes": (NTT_PRIME_36,), "special_prime": NTT_PRIME_18},
        {"data_primes": (NTT_PRIME_36, NTT_PRIME_35), "special_prime": NTT_PRIME_18},
        {"data_primes": (0x1FFFFFFFFE1003,)},  # not 1 modulo 2N
        {"data_primes": (0x1FFFFFFFFE1001 - 2048,)},
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
        {"poly_modulus_degree": 2048},  # 89 bits at degree 2048
        {"special_prime": None},
        {"data_primes": (NTT_PRIME_36,)},
        {"data_primes": (NTT_PRIME_36, NTT_PRIME_35, NTT_PRIME_18)},  # 107 bits
        {"data_primes": (0xFFFFEE001, 0x7FFFF6001 + 2)},
        {"special_prime": 0x2E003},
        {"special_prime": (1 << 40) + 1},
    ],
    ids=str,
)
def test_unsafe_variations_of_strong_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        replace(STRONG, **change)


def test_safe_variations_are_possible() -> None:
    """The refusals above are not refusals of everything."""
    smaller = replace(COMPACT, name="small", data_primes=(NTT_PRIME_36,))
    assert smaller.id != COMPACT.id
    assert replace(STRONG, special_prime=0x10001).id != STRONG.id


def test_sets_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        COMPACT.poly_modulus_degree = 1024  # type: ignore[misc]


def test_names() -> None:
    assert parameter_set("compact") is COMPACT
    assert parameter_set("strong") is STRONG
    for name in ("", "Compact", "insecure", "x" * 1000):
        with pytest.raises(ParameterError) as raised:
            parameter_set(name)
        assert len(str(raised.value)) < 200


def test_minimum() -> None:
    assert STRONG.at_least(COMPACT)
    assert STRONG.at_least(STRONG)
    assert COMPACT.at_least(COMPACT)
    assert not COMPACT.at_least(STRONG)


def test_most_wanted_coefficients() -> None:
    """w (e + 11) <= 1,152 up to e = 7 and 920 up to 12; in strong 192 up to 9 and 128 up to 12."""
    assert [COMPACT.max_wanted(e) for e in range(13)] == [
        *(1152 // (e + 11) for e in range(8)),
        *(920 // (e + 11) for e in range(8, 13)),
    ]
    assert [STRONG.max_wanted(e) for e in range(13)] == [192] * 10 + [128] * 3
    for parameters in PARAMETER_SETS.values():
        with pytest.raises(ScaleError):
            parameters.max_wanted(13)
