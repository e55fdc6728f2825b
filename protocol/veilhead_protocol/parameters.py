"""Parameter sets: named, frozen, and safe by construction.

There is no negotiation. A manifest names one of these sets, its digest is pinned, and both sides
refuse any other.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from veilhead_protocol.errors import ParameterError, ScaleError

#: Largest log2 of the whole modulus, special prime included, for 128 bits of classical security
#: with a ternary secret. Source: Bossuat et al., "Security Guidelines for Implementing Homomorphic
#: Encryption", IACR ePrint 2024/463, table for ternary secrets; read 2026-11. The 2018 standard
#: (HomomorphicEncryption.org, November 2018) allows 54 and 109, so these are the stricter ones.
MAX_MODULUS_BITS: Final = {2048: 53, 4096: 106}

#: Variance of SEAL's centred binomial error (21 coin pairs): 21 / 2.
#: Source: SEAL 4.3, `sample_poly_cbd` in native/src/seal/util/rlwe.cpp.
ERROR_VARIANCE: Final = 10.5

#: Largest exponent e of a head that either set carries.
MAX_EXPONENT: Final = 12


@dataclass(frozen=True)
class ParameterSet:
    """One RLWE parameter set; an unsafe one cannot be constructed.

    Attributes:
        name: what manifests and users call it.
        poly_modulus_degree: N, coefficients in a polynomial.
        data_primes: the primes of the ciphertext modulus Q, in the order of the wire.
        special_prime: SEAL reserves the last of several primes for keys; None if there is one.
        estimated_bits: log2 of the cheapest known attack (lattice-estimator 27a581b, 2026-06-06;
            least of usvp, bdd, dual hybrid, primal hybrid; error 3.2, unlimited samples).
        hint_limits: (largest e, bits) pairs; see `max_wanted`.

    Raises:
        ParameterError: when the modulus exceeds `MAX_MODULUS_BITS` or is malformed.
    """

    name: str
    poly_modulus_degree: int
    data_primes: tuple[int, ...]
    special_prime: int | None
    estimated_bits: float
    hint_limits: tuple[tuple[int, int], ...]
    hint_weighs_exponent: bool

    def __post_init__(self) -> None:
        limit = MAX_MODULUS_BITS.get(self.poly_modulus_degree)
        if limit is None:
            raise ParameterError(
                f"polynomial degree {self.poly_modulus_degree} is not supported, "
                f"expected one of {sorted(MAX_MODULUS_BITS)}"
            )
        if not self.data_primes:
            raise ParameterError("a parameter set needs at least one data prime")
        if (self.special_prime is None) != (len(self.data_primes) == 1):
            raise ParameterError("SEAL reserves a special prime exactly when there are several")
        bits = sum(prime.bit_length() for prime in self.key_primes)
        if bits > limit:
            raise ParameterError(
                f"a modulus of {bits} bits at degree {self.poly_modulus_degree} is below "
                f"128 bits of security, expected at most {limit} bits"
            )
        for prime in self.key_primes:
            if prime % (2 * self.poly_modulus_degree) != 1:
                raise ParameterError("every prime must be 1 modulo twice the polynomial degree")

    @property
    def key_primes(self) -> tuple[int, ...]:
        """All primes, the special one last: the modulus of key messages."""
        return (
            self.data_primes
            if self.special_prime is None
            else (*self.data_primes, self.special_prime)
        )

    @cached_property
    def data_modulus(self) -> int:
        """Q, the product of the data primes."""
        product = 1
        for prime in self.data_primes:
            product *= prime
        return product

    @cached_property
    def canonical_form(self) -> bytes:
        """The bytes whose SHA-256 is `id`; docs/wire-format.md states this form."""
        special = "" if self.special_prime is None else f"{self.special_prime:#x}"
        lines = (
            "veilhead-parameters 1",
            "scheme=ckks",
            f"degree={self.poly_modulus_degree}",
            "data=" + ",".join(f"{prime:#x}" for prime in self.data_primes),
            f"special={special}",
            "secret=ternary",
            "error=cbd21",
        )
        return "".join(line + "\n" for line in lines).encode("ascii")

    @cached_property
    def id(self) -> bytes:
        """32 bytes that name this set on the wire."""
        return hashlib.sha256(self.canonical_form).digest()

    def max_wanted(self, exponent: int) -> int:
        """Most wanted coefficients in one reply polynomial, for a head of this exponent.

        A client that crafts its key may learn up to e + 11 bits about the masking polynomial for
        every coefficient that it is sent. Within this limit the estimate with those hints stays
        above 2^125 (lattice-estimator as above, leaky-LWE hints).

        Raises:
            ScaleError: when the exponent is larger than `MAX_EXPONENT`.
        """
        for largest, limit in self.hint_limits:
            if exponent <= largest:
                return limit // (exponent + 11) if self.hint_weighs_exponent else limit
        raise ScaleError(f"exponent {exponent} is too large, expected at most {MAX_EXPONENT}")

    def at_least(self, minimum: ParameterSet) -> bool:
        """Whether this set is no weaker than `minimum`."""
        return self.estimated_bits >= minimum.estimated_bits


COMPACT: Final = ParameterSet(
    name="compact",
    poly_modulus_degree=2048,
    data_primes=(0x1FFFFFFFFE1001,),
    special_prime=None,
    estimated_bits=128.8,
    hint_limits=((7, 1152), (12, 920)),
    hint_weighs_exponent=True,
)

STRONG: Final = ParameterSet(
    name="strong",
    poly_modulus_degree=4096,
    data_primes=(0xFFFFEE001, 0x7FFFF6001),
    special_prime=0x2E001,
    estimated_bits=156.7,
    hint_limits=((9, 192), (12, 128)),
    hint_weighs_exponent=False,
)

PARAMETER_SETS: Final = {COMPACT.name: COMPACT, STRONG.name: STRONG}


def parameter_set(name: str) -> ParameterSet:
    """The set of this name.

    Raises:
        ParameterError: when there is none.
    """
    found = PARAMETER_SETS.get(name)
    if found is None:
        raise ParameterError(
            f"unknown parameter set {name[:40]!r}, expected one of {', '.join(PARAMETER_SETS)}"
        )
    return found
