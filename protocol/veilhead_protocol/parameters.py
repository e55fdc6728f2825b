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

#: Largest log2 of the modulus for 128 bits of classical security with a ternary secret. Source:
#: Bossuat et al., "Security Guidelines for Implementing Homomorphic Encryption", IACR ePrint
#: 2024/463, table for ternary secrets; read 2026-11. The 2018 standard (HomomorphicEncryption.org,
#: November 2018) allows 54 and 109, so these are the stricter ones.
MAX_MODULUS_BITS: Final = {2048: 53, 4096: 106}

#: Variance of SEAL's centred binomial error (21 coin pairs): 21 / 2.
#: Source: SEAL 4.3, `sample_poly_cbd` in native/src/seal/util/rlwe.cpp.
ERROR_VARIANCE: Final = 10.5

#: Largest exponent of the logits that a ciphertext carries. A head of larger logits is served
#: divided by a power of two: `scales` says how.
MAX_SERVED_EXPONENT: Final = 6


@dataclass(frozen=True)
class ParameterSet:
    """One RLWE parameter set; an unsafe one cannot be constructed.

    Attributes:
        name: what manifests and users call it.
        poly_modulus_degree: N, coefficients in a polynomial.
        prime: Q, the ciphertext modulus.
        estimated_bits: log2 of the cheapest known attack (lattice-estimator 27a581b, 2026-06-06;
            least of usvp, bdd, dual hybrid; MATZOV's cost model; error 3.24, unlimited samples).
            docs/estimates.py repeats it.
        core_svp_bits: usvp in the core-SVP model, log2 of (classical, quantum) cost: 0.292 and
            0.257 times the block size.
        hint_bits: what `max_wanted` divides.

    Raises:
        ParameterError: when the modulus exceeds `MAX_MODULUS_BITS` or is malformed.
    """

    name: str
    poly_modulus_degree: int
    prime: int
    estimated_bits: float
    core_svp_bits: tuple[float, float]
    hint_bits: int

    def __post_init__(self) -> None:
        limit = MAX_MODULUS_BITS.get(self.poly_modulus_degree)
        if limit is None:
            raise ParameterError(
                f"polynomial degree {self.poly_modulus_degree} is not supported, "
                f"expected one of {sorted(MAX_MODULUS_BITS)}"
            )
        # Residues have to be exact in double precision as well.
        limit = min(limit, 53)
        if self.prime.bit_length() > limit:
            raise ParameterError(
                f"a modulus of {self.prime.bit_length()} bits at degree "
                f"{self.poly_modulus_degree} is not supported, expected at most {limit} bits"
            )
        if self.prime % (2 * self.poly_modulus_degree) != 1:
            raise ParameterError("the prime must be 1 modulo twice the polynomial degree")

    @property
    def residue_bits(self) -> int:
        """Bits of a residue on the wire."""
        return self.prime.bit_length()

    @cached_property
    def canonical_form(self) -> bytes:
        """The bytes whose SHA-256 is `id`; docs/wire-format.md states this form."""
        lines = (
            "veilhead-parameters 2",
            "scheme=ckks",
            f"degree={self.poly_modulus_degree}",
            f"prime={self.prime:#x}",
            "secret=ternary",
            "error=cbd21",
        )
        return "".join(line + "\n" for line in lines).encode("ascii")

    @cached_property
    def id(self) -> bytes:
        """32 bytes that name this set on the wire."""
        return hashlib.sha256(self.canonical_form).digest()

    def max_wanted(self, exponent: int) -> int:
        """Most wanted coefficients in one reply polynomial, for logits below 2^exponent as served.

        A client that crafts its key may learn up to exponent + 11 bits about the masking polynomial
        for every coefficient that it is sent. docs/protocol.md has the estimates with those hints:
        above 2^257 for `standard`, above 2^145 for `compact`. They rest on the noise of the cut to
        kappa = exponent + 21 bits: replies with all their digits would leave 2^143 and 2^87.

        Raises:
            ScaleError: when the exponent is larger than `MAX_SERVED_EXPONENT`.
        """
        if not 0 <= exponent <= MAX_SERVED_EXPONENT:
            raise ScaleError(
                f"logits are served below 2^{exponent}, expected an exponent of 0 to "
                f"{MAX_SERVED_EXPONENT}"
            )
        return self.hint_bits // (exponent + 11)

    def at_least(self, minimum: ParameterSet) -> bool:
        """Whether this set is no weaker than `minimum`."""
        return self.estimated_bits >= minimum.estimated_bits


STANDARD: Final = ParameterSet(
    name="standard",
    poly_modulus_degree=4096,
    prime=0x1FFFFFFFFB4001,
    estimated_bits=273.9,
    core_svp_bits=(256.4, 225.6),
    hint_bits=2900,
)

COMPACT: Final = ParameterSet(
    name="compact",
    poly_modulus_degree=2048,
    prime=0x3FFFFFFFFC001,
    estimated_bits=137.1,
    core_svp_bits=(110.1, 96.9),
    hint_bits=1152,
)

PARAMETER_SETS: Final = {STANDARD.name: STANDARD, COMPACT.name: COMPACT}


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
