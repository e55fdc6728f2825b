"""The private head, evaluated on encrypted embeddings.

For every group of classes: the product with the group's weight polynomial, a fresh encryption of
zero under the client's key, bias and flood on the wanted coefficients, and residues cut down to
kappa bits. Each step protects the head or the query; docs/threat-model.md says which, and the
tests attack the product with each one removed.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tenseal import sealapi

from veilhead_protocol import seal_io
from veilhead_protocol.encoding import encode
from veilhead_protocol.errors import KeyMismatchError, ModelMismatchError, ParameterMismatchError
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.parameters import ParameterSet
from veilhead_protocol.scales import quantise
from veilhead_protocol.wire import (
    Domain,
    KeyMessage,
    QueryMessage,
    ReplyMessage,
    ReplyPolynomial,
    Residues,
    key_id,
)


@dataclass(frozen=True)
class ClientKey:
    """A registered key, ready to encrypt zero under. It cannot decrypt anything."""

    parameters: ParameterSet
    id: bytes
    seed: bytes
    encryptor: Any

    @classmethod
    def from_message(cls, data: bytes) -> ClientKey:
        """The key of a key message's bytes.

        Raises:
            WireError: one of its kinds, when the bytes are not a key message.
        """
        message = KeyMessage.deserialize(data)
        seal = seal_io.runtime(message.parameters)
        public_key = seal_io.load_public_key(
            seal,
            message.b,
            message.seed,
            prng=message.prng,
            ntt_form=message.domain is Domain.NTT,
        )
        encryptor = sealapi.Encryptor(seal.context, public_key)
        return cls(message.parameters, key_id(data), message.seed, encryptor)


class EncryptedHead:
    """One head, its weight polynomials encoded once."""

    def __init__(
        self, manifest: Manifest, weight: NDArray[np.float64], bias: NDArray[np.float64]
    ) -> None:
        """Encode weight [C, d] and bias [C], which must be the ones that the manifest is of."""
        self.manifest = manifest
        self.parameters = manifest.parameter_set
        self.layout = manifest.layout
        self._scales = manifest.scales
        self._seal = seal_io.runtime(self.parameters)
        self._wanted = [self.layout.wanted(reply) for reply in range(self.layout.replies)]
        bits = self._scales.weight_scale_bits
        packed = self.layout.pack_weight(quantise(weight, bits))  # [replies, pieces, N]
        # SEAL refuses to multiply by zero; such a polynomial costs a product with one all the same.
        one = np.zeros(self.layout.degree)
        one[0] = 1.0
        self._stand_in = encode(self._seal, one, bits)
        self._weights = [
            [encode(self._seal, row, bits) if row.any() else None for row in pieces]
            for pieces in packed
        ]
        delta = 2**self._scales.scale_bits
        offsets = [round(float(value) * delta) for value in bias]
        group = self.layout.group
        self._offsets = [offsets[start : start + group] for start in range(0, len(bias), group)]

    @property
    def held_bytes(self) -> int:
        """Bytes of the encoded weights, which are nearly all that a head holds."""
        polynomials = sum(weight is not None for row in self._weights for weight in row)
        return polynomials * self.layout.degree * len(self.parameters.data_primes) * 8

    def __repr__(self) -> str:
        return f"EncryptedHead({self.manifest.name!r}, {self.manifest.digest.hex()[:12]})"

    def evaluate(self, query_bytes: bytes, key: ClientKey) -> bytes:
        """The bytes of the reply to a query's bytes, under the client's key.

        Raises:
            WireError: one of its kinds, when the query is not one that this head answers.
        """
        if key.parameters != self.parameters:
            raise ParameterMismatchError(
                f"the key is of the set {key.parameters.name}, "
                f"expected {self.parameters.name} for this model"
            )
        query = QueryMessage.deserialize(
            query_bytes, self.parameters, self.layout, key_seed=key.seed
        )
        if query.model_digest != self.manifest.digest:
            raise ModelMismatchError("the query names another version of this model")
        if query.key_id != key.id:
            raise KeyMismatchError("the query names another key")
        pieces = [
            seal_io.load_seeded_ciphertext(
                self._seal,
                polynomial.c0,
                polynomial.seed,
                prng=query.prng,
                ntt_form=query.domain is Domain.NTT,
                scale_bits=self._scales.query_scale_bits,
            )
            for polynomial in query.polynomials
        ]
        reply = ReplyMessage(
            parameters=self.parameters,
            model_digest=query.model_digest,
            key_id=query.key_id,
            layout=self.layout,
            reply_bits=self._scales.reply_bits,
            query_digest=hashlib.sha256(query_bytes).digest(),
            polynomials=tuple(
                self._answer(pieces, reply, key) for reply in range(self.layout.replies)
            ),
        )
        return reply.serialize()

    def _answer(self, pieces: list[Any], reply: int, key: ClientKey) -> ReplyPolynomial:
        ciphertext = self._rerandomise(self._product(pieces, reply), key)
        self._seal.evaluator.transform_from_ntt_inplace(ciphertext)
        c0, c1 = seal_io.save_ciphertext(ciphertext)  # [L, N] each
        wanted = c0[:, self._wanted[reply]]  # [L, classes of this group]
        return ReplyPolynomial(
            c0=self._truncate(self._add_offsets(wanted, reply)), c1=self._truncate(c1)
        )

    def _product(self, pieces: list[Any], reply: int) -> Any | None:
        """The sum over the pieces of query times weight; None when all the weights are zero."""
        evaluator = self._seal.evaluator
        total = None
        for piece, weight in zip(pieces, self._weights[reply], strict=True):
            product = self._seal.new_ciphertext()
            evaluator.multiply_plain(piece, weight or self._stand_in, product)
            if weight is None:
                continue
            if total is None:
                total = product
            else:
                evaluator.add_inplace(total, product)
        return total

    def _rerandomise(self, product: Any | None, key: ClientKey) -> Any:
        """The product plus a fresh encryption of zero.

        Without it, reply over query is the weights; with one used twice, two replies differ by the
        weights.
        """
        zero = self._seal.new_ciphertext()
        key.encryptor.encrypt_zero(self._seal.data_parms_id, zero)
        if product is None:
            return zero
        zero.scale = product.scale
        self._seal.evaluator.add_inplace(zero, product)
        return zero

    def _flood(self, count: int) -> list[int]:
        """Integers uniform in [-F, F] from the operating system: they hide the query's noise."""
        bound = 2**self._scales.flood_bits
        return [secrets.randbelow(2 * bound + 1) - bound for _ in range(count)]

    def _add_offsets(self, wanted: Residues, reply: int) -> Residues:
        """Wanted coefficients [L, n] plus bias and flood, prime by prime."""
        offsets = self._offsets[reply]
        added = [
            bias + flood for bias, flood in zip(offsets, self._flood(len(offsets)), strict=True)
        ]
        rows = [
            [(int(value) + offset) % prime for value, offset in zip(row, added, strict=True)]
            for row, prime in zip(wanted, self.parameters.data_primes, strict=True)
        ]
        return np.array(rows, dtype=np.uint64)

    def _truncate(self, residues: Residues) -> Residues:
        return truncate(residues, self.parameters, self._scales.reply_bits)


def truncate(residues: Residues, parameters: ParameterSet, reply_bits: int) -> Residues:
    """round(2^kappa c / Q) modulo 2^kappa for the residues [L, n] of c: [n].

    c / Q is the fractional part of sum_i ([c_i (Q / q_i)^-1] mod q_i) / q_i, in double precision:
    a value within 2^-20 of a tie may round either way, one unit of 2^-20 of a logit.
    """
    fraction = np.zeros(residues.shape[1])
    for row, prime in zip(residues, parameters.data_primes, strict=True):
        cofactor = parameters.data_modulus // prime
        digit = row if cofactor == 1 else _multiply_modulo(row, pow(cofactor, -1, prime), prime)
        fraction += digit / prime
    fraction -= np.floor(fraction)
    scaled = np.rint(fraction * 2.0**reply_bits).astype(np.uint64)
    return scaled & np.uint64((1 << reply_bits) - 1)


def _multiply_modulo(values: Residues, factor: int, prime: int) -> Residues:
    """values * factor modulo a prime of at most 36 bits, in 64-bit words."""
    high, low = divmod(factor, 1 << 18)
    modulus = np.uint64(prime)
    upper = values * np.uint64(high) % modulus
    return ((upper << np.uint64(18)) + values * np.uint64(low)) % modulus
