"""The private head, evaluated on encrypted embeddings.

For every group of classes: a fresh encryption of zero under the client's key, plus the products
with the group's weight polynomials, plus bias and flood on the wanted coefficients, and residues
cut down to kappa bits. Each step protects the head or the query; docs/threat-model.md says which,
and the tests attack the product with each one removed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice, pairwise, starmap
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tenseal import sealapi

from veilhead_protocol import seal_io
from veilhead_protocol.copies import MadeAhead
from veilhead_protocol.encoding import encode
from veilhead_protocol.errors import (
    KeyMismatchError,
    ModelMismatchError,
    ParameterMismatchError,
)
from veilhead_protocol.layout import Layout, LayoutKind
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.parameters import ParameterSet
from veilhead_protocol.scales import served_weight
from veilhead_protocol.wire import (
    Domain,
    KeyMessage,
    QueryHeader,
    QueryMessage,
    ReplyMessage,
    ReplyPolynomial,
    Residues,
    key_id,
)
from veilhead_service.limits import requested_layout

#: Reply polynomials that are masked and cut together: what bounds the memory of a large head.
_REPLIES_AT_ONCE: Final = 256

#: Columns of a matrix product at once, so that its operands stay in the processor's cache.
_COLUMNS_AT_ONCE: Final = 512


@dataclass(frozen=True)
class ClientKey:
    """A registered key, ready to encrypt zero under. It cannot decrypt anything.

    Zeros may be encrypted ahead, since that takes half the time of a query. Each is used once.
    """

    parameters: ParameterSet
    id: bytes
    seed: bytes
    encryptor: Any
    _ahead: MadeAhead[Any] = field(default_factory=MadeAhead, repr=False, compare=False)

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

    def zero(self) -> Any:
        """A fresh encryption of zero: one that was made ahead, or a new one."""
        return self._ahead.take(self._encrypt_zero)

    def prepare(self, count: int) -> bool:
        """Encrypt one zero ahead, unless so many are ready; whether one was."""
        if len(self._ahead) >= count:
            return False
        self._ahead.add(self._encrypt_zero())
        return True

    def forget_prepared(self) -> None:
        """Drop what was made ahead."""
        self._ahead.clear()

    def _encrypt_zero(self) -> Any:
        seal = seal_io.runtime(self.parameters)
        zero = seal.new_ciphertext()
        self.encryptor.encrypt_zero(seal.parms_id, zero)
        return zero


#: The weight polynomials of a layout, [R][P]; None for one that is zero.
_Weights = list[list[Any | None]]


class EncryptedHead:
    """One head. Weight polynomials are encoded once for each layout that is asked for."""

    def __init__(
        self, manifest: Manifest, weight: NDArray[np.float64], bias: NDArray[np.float64]
    ) -> None:
        """Encode weight [C, d] and bias [C], which must be the ones that the manifest is of."""
        self.manifest = manifest
        self.parameters = manifest.parameter_set
        self.layout = manifest.layout
        self._scales = manifest.scales
        self._seal = seal_io.runtime(self.parameters)
        self._weight = served_weight(weight, self._scales)  # [C, d]
        served_bias = np.ldexp(bias, -self._scales.downscale_bits)
        delta = 2**self._scales.scale_bits
        self._biases: Residues = np.array(
            [round(float(value) * delta) % self.parameters.prime for value in served_bias],
            dtype=np.uint64,
        )  # [C]
        # SEAL refuses to multiply by zero; such a polynomial costs a product with one all the same.
        self._stand_in = self._encode(np.ones(1))
        # All of them stay: `block_sizes` bounds how many there can be.
        self._weights = {1: self._encoded(self.layout)}

    @property
    def held_bytes(self) -> int:
        """Bytes of the encoded weights, which are nearly all that a head holds."""
        rows = chain.from_iterable(self._weights.values())
        polynomials = sum(weight is not None for row in rows for weight in row)
        return self._weight.nbytes + polynomials * self.layout.degree * 8

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
        layout = requested_layout(QueryHeader.deserialize(query_bytes), self.manifest)
        query = QueryMessage.deserialize(query_bytes, self.parameters, layout, key_seed=key.seed)
        if query.model_digest != self.manifest.digest:
            raise ModelMismatchError("the query names another version of this model")
        if query.key_id != key.id:
            raise KeyMismatchError("the query names another key")
        reply = ReplyMessage(
            parameters=self.parameters,
            model_digest=query.model_digest,
            key_id=query.key_id,
            layout=layout,
            reply_bits=self._scales.reply_bits,
            query_digest=hashlib.sha256(query_bytes).digest(),
            polynomials=tuple(self._answer(layout, self._masked(query, key))),
        )
        return reply.serialize()

    def _masked(self, query: QueryMessage, key: ClientKey) -> Iterator[Residues]:
        """For every reply polynomial the coefficients [2, N] of mask plus query times weights."""
        if query.layout.kind is LayoutKind.BULK:
            ciphertexts = self._matrix_products(query, key)
        else:
            ciphertexts = self._products(query, key)
        for ciphertext in ciphertexts:
            self._seal.evaluator.transform_from_ntt_inplace(ciphertext)
            yield seal_io.save_ciphertext(self._seal, ciphertext)

    def _products(self, query: QueryMessage, key: ClientKey) -> Iterator[Any]:
        """For every reply polynomial the mask plus the sum over the pieces of query times weight.

        The same work is done for a weight polynomial that is zero, and thrown away: an answer's
        time does not tell how many there are.
        """
        evaluator, pieces = self._seal.evaluator, self._pieces(query)
        for row in self._weights_of(query.layout):
            total = self._mask(key)
            for piece, weight in zip(pieces, row, strict=True):
                product = self._seal.new_ciphertext()
                evaluator.multiply_plain(piece, weight or self._stand_in, product)
                evaluator.add_inplace(total if weight else product, product)
            yield total

    def _pieces(self, query: QueryMessage) -> list[Any]:
        """The ciphertexts of a query, whose second halves are expanded from their seeds."""
        return [
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

    def _mask(self, key: ClientKey) -> Any:
        """A fresh encryption of zero, which every sum begins with.

        Without it, reply over query is the weights; with one used twice, two replies differ by the
        weights.
        """
        zero = key.zero()
        zero.scale = 2.0**self._scales.scale_bits
        return zero

    def _answer(self, layout: Layout, masked: Iterator[Residues]) -> Iterator[ReplyPolynomial]:
        """What is sent of each masked product, once it is flooded and cut."""
        reply = 0
        while part := list(islice(masked, _REPLIES_AT_ONCE)):
            places = _places(layout, reply, len(part))
            picked = [c0[wanted] for (c0, _), wanted in zip(part, places.wanted, strict=True)]
            flooded = self._add_offsets(np.concatenate(picked), places.classes)
            logits = self._truncate(flooded)
            cut = self._truncate(np.stack([c1 for _, c1 in part]))  # [replies, N]
            for place, c1 in zip(places.parts, cut, strict=True):
                yield ReplyPolynomial(logits[place], c1)
            reply += len(part)

    def _matrix_products(self, query: QueryMessage, key: ClientKey) -> Iterator[Any]:
        """The same sums for every class at once: integers times residues, one matrix product.

        In bulk a weight polynomial has at most a few coefficients, so the sum over pieces and
        coefficients of weight times (X^k times query) costs far less than products would.
        """
        layout = query.layout
        shape = (2, layout.degree)
        shifted = np.empty((layout.pieces, layout.block_length, *shape), dtype=np.uint64)
        for row, polynomial in zip(shifted, query.polynomials, strict=True):
            seal_io.expand_residues(
                self._seal,
                polynomial.c0,
                polynomial.seed,
                prng=query.prng,
                ntt_form=query.domain is Domain.NTT,
                into=row[0],
            )
        seal_io.shift_residues(self.parameters, shifted)
        rows = shifted.reshape(-1, 2 * layout.degree)  # [P t, 2 N]
        scale = 2.0**self._scales.weight_scale_bits
        weight = layout.pack_weight(self._weight * scale).reshape(layout.classes, -1)  # [C, P t]
        for start in range(0, layout.classes, _REPLIES_AT_ONCE):
            part = weight[start : start + _REPLIES_AT_ONCE]
            sums = multiply_modulo(part, rows, self.parameters.prime)
            for residues in sums.reshape(-1, *shape):
                total = self._mask(key)
                product = seal_io.load_ciphertext(
                    self._seal, residues, scale_bits=self._scales.scale_bits
                )
                self._seal.evaluator.add_inplace(total, product)
                yield total

    def _weights_of(self, layout: Layout) -> _Weights:
        """The weight polynomials in a layout, encoded when they are not here yet."""
        if layout.texts not in self._weights:
            self._weights[layout.texts] = self._encoded(layout)
        return self._weights[layout.texts]

    def _encoded(self, layout: Layout) -> _Weights:
        packed = layout.pack_weight(self._weight)  # [R, P, G t]
        return [[self._encoded_or_none(row) for row in pieces] for pieces in packed]

    def _encoded_or_none(self, coefficients: NDArray[np.float64]) -> Any | None:
        """A weight polynomial; None for zero, which takes as long: the first query waits for it."""
        is_zero = not coefficients.any()
        encoded = self._encode(np.ones(len(coefficients)) if is_zero else coefficients)
        return None if is_zero else encoded

    def _encode(self, coefficients: NDArray[np.float64]) -> Any:
        """The weight polynomial that begins with these coefficients, in NTT form."""
        padded = np.zeros(self.layout.degree)
        padded[: len(coefficients)] = coefficients
        return encode(self._seal, padded, self._scales.weight_scale_bits)

    def _flood(self, count: int) -> NDArray[np.int64]:
        """Integers uniform in [-F, F), [count], from the operating system.

        They hide the query's noise. F is a power of two: whole random bits are uniform.
        """
        bits = self._scales.flood_bits
        drawn = np.frombuffer(os.urandom(8 * count), dtype="<u8") >> np.uint64(64 - bits - 1)
        return drawn.astype(np.int64) - (1 << bits)

    def _add_offsets(self, wanted: Residues, classes: NDArray[np.intp]) -> Residues:
        """Wanted coefficients [n] plus bias and flood."""
        prime = self.parameters.prime
        flood = np.mod(self._flood(len(classes)), prime).astype(np.uint64)
        return (wanted + self._biases[classes] + flood) % np.uint64(prime)

    def _truncate(self, residues: Residues) -> Residues:
        return truncate(residues, self.parameters, self._scales.reply_bits)


class _Places(NamedTuple):
    """Where the logits of some reply polynomials are, one polynomial after the other.

    Attributes:
        wanted: the coefficients of each that hold logits.
        classes: the class of every logit.
        parts: which of all these logits are those of each polynomial.
    """

    wanted: list[NDArray[np.intp]]
    classes: NDArray[np.intp]
    parts: list[slice]


@lru_cache(maxsize=8)  # of at most 4 MB each
def _places(layout: Layout, first: int, count: int) -> _Places:
    """The places of reply polynomials `first`, `first + 1`, ..., `count` of them."""
    replies = range(first, first + count)
    wanted = [layout.wanted(reply) for reply in replies]
    classes = [
        np.arange(reply * layout.group, min((reply + 1) * layout.group, layout.classes))
        for reply in replies
    ]
    ends = np.cumsum([0, *map(len, wanted)]).tolist()
    return _Places(
        wanted,
        np.concatenate([np.tile(some, layout.texts) for some in classes]),
        list(starmap(slice, pairwise(ends))),
    )


def multiply_modulo(integers: NDArray[np.float64], residues: Residues, prime: int) -> Residues:
    """Integers [m, k] times residues [k, n] modulo a prime: [m, n], exact.

    The residues are cut into limbs so small that no sum of a float64 matrix product passes 2^53.
    """
    largest = int(np.abs(integers).sum(axis=1).max())
    bits = 53 - largest.bit_length()
    limbs = -(-prime.bit_length() // bits)
    bits = -(-prime.bit_length() // limbs)
    mask = np.uint64((1 << bits) - 1)
    total = np.empty((len(integers), residues.shape[1]), dtype=np.uint64)
    for start in range(0, residues.shape[1], _COLUMNS_AT_ONCE):
        part = np.ascontiguousarray(residues[:, start : start + _COLUMNS_AT_ONCE])
        found = np.zeros((len(integers), part.shape[1]), dtype=np.int64)
        for limb in reversed(range(limbs)):
            digits = (part >> np.uint64(limb * bits)) & mask
            sums = (integers @ digits.view(np.int64).astype(np.float64)).astype(np.int64)
            found = np.mod(_shift(found, bits, prime) + sums, prime)
        total[:, start : start + _COLUMNS_AT_ONCE] = found
    return total


def _shift(values: NDArray[np.int64], bits: int, prime: int) -> NDArray[np.int64]:
    """values * 2^bits modulo the prime, up to a few times the prime, for values below it.

    The quotient is off by a unit or two in double precision; the difference is exact modulo 2^64
    and small.
    """
    quotient = (values * (2.0**bits / prime)).astype(np.int64)
    shifted: NDArray[np.int64] = (values << bits) - quotient * prime
    return shifted


def truncate(residues: Residues, parameters: ParameterSet, reply_bits: int) -> Residues:
    """round(2^kappa c / Q) modulo 2^kappa for residues c, same shape.

    In double precision: a value within 2^-20 of a tie may round either way, one unit of 2^-20 of a
    logit as it is served.
    """
    scaled: Residues = np.rint(residues * (2.0**reply_bits / parameters.prime)).astype(np.uint64)
    return scaled & np.uint64((1 << reply_bits) - 1)
