"""A slot-packed product by rotations, baby steps and giant steps, through TenSEAL's `sealapi`.

The shortest way that slots allow, as far as we know it. SEAL's parameters are the smallest that
leave room for one product (degree 4096, primes of 35, 35 and 39 bits; 109 bits are what SEAL allows
for 128 bits of security). The embedding is folded into complex slots, two features in one, and
repeated with the period D, so that one ciphertext holds it n / D times (n slots). With I the least
power of two that fits C rows, I rows to a repetition:

- slot k D + j belongs to row k I + (j mod I), and its weight in product i to column (j + i) mod D;
- I products, each with the query rotated by its i: `baby` rotations of the query, which all the
  giant steps share, and `giant` rotations of sums, after the modulus has been cut by one prime;
- log2(D / I) rotations and additions gather each row's columns in slot k D + j, j < I.

A head of more rows than fit is cut into parts, each with a ciphertext of its own down; the
rotations of the query are shared.

Only the keys of these rotations are made. Hoisting (one decomposition for all baby steps) is what
SEAL lacks. Nothing here hides the head: other slots of the reply hold partial sums of it.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tenseal import sealapi

from veilhead_benchmarks.heads import Head, Messages

DEGREE: Final = 4096
PRIME_BITS: Final = (35, 35, 39)
SLOTS: Final = DEGREE // 2
_QUERY_BITS: Final = 34
_WEIGHT_BITS: Final = 30

_LENGTH: Final = struct.Struct("<I")

#: What a rotation of the query costs, in rotations after the modulus has been cut, about.
_BABY_COST: Final = 1.3


@dataclass(frozen=True)
class Plan:
    """Where columns and rows sit, and which rotations that takes.

    Attributes:
        period: D, slots of one repetition of the embedding.
        products: I, which is also the rows of one repetition.
        baby: rotations of the query, the one by zero included.
        parts: ciphertexts of the result.
    """

    period: int
    products: int
    baby: int
    parts: int

    @classmethod
    def of(cls, dimensions: int, classes: int) -> Plan:
        """The plan for a head.

        Raises:
            ValueError: when it does not fit into one ciphertext.
        """
        period = _power(-(-dimensions // 2))
        repetitions = SLOTS // period
        if not repetitions:
            raise ValueError(f"got {dimensions} values, expected what fits {SLOTS} slots")
        parts = -(-classes // SLOTS)  # a repetition holds at most a row for each of its slots
        products = _power(-(-classes // (parts * repetitions)))
        choices = [2**power for power in range(products.bit_length())]
        baby = min(choices, key=lambda count: (_BABY_COST * (count - 1) + products // count, count))
        return cls(period, products, baby, parts)

    @property
    def giant(self) -> int:
        """Rotations of sums, the one by zero included."""
        return self.products // self.baby

    @property
    def baby_steps(self) -> tuple[int, ...]:
        """By how many slots the query is rotated."""
        return tuple(range(1, self.baby))

    @property
    def giant_steps(self) -> tuple[int, ...]:
        """By how many slots sums are rotated."""
        return tuple(self.baby * step for step in range(1, self.giant))

    @property
    def gathering_steps(self) -> tuple[int, ...]:
        """By how many slots the result is rotated and added to itself."""
        return tuple(
            self.products * 2**step for step in range(int(math.log2(self.period // self.products)))
        )

    @property
    def rotations(self) -> int:
        """All of them."""
        return len(self.baby_steps) + self.parts * (
            len(self.giant_steps) + len(self.gathering_steps)
        )

    @property
    def rows(self) -> int:
        """Rows of one part."""
        return self.products * (SLOTS // self.period)

    def pack_embedding(self, embedding: NDArray[np.float64]) -> NDArray[np.complex128]:
        """Embedding [d] as slots [n], column j being x_j + i x_(j + D)."""
        folded = np.zeros(2 * self.period)
        folded[: len(embedding)] = embedding
        real, imaginary = folded.reshape(2, self.period)
        return np.tile(real + 1j * imaginary, SLOTS // self.period)

    def pack_weight(self, weight: NDArray[np.float64]) -> NDArray[np.complex128]:
        """Weight [C, d] of one part as the slots of every product: [giant, baby, n].

        They are rotated back by giants.
        """
        classes, dimensions = weight.shape
        folded = np.zeros((self.rows, 2 * self.period))
        folded[:classes, :dimensions] = weight
        # The real part of (w - i v)(x + i y) is w x + v y.
        columns = folded[:, : self.period] - 1j * folded[:, self.period :]  # [rows, D]
        slot = np.arange(SLOTS)
        repetition, j = np.divmod(slot, self.period)
        row = repetition * self.products + j % self.products
        packed = np.empty((self.giant, self.baby, SLOTS), dtype=np.complex128)
        for giant in range(self.giant):
            for baby in range(self.baby):
                step = giant * self.baby + baby
                packed[giant, baby] = np.roll(
                    columns[row, (j + step) % self.period], giant * self.baby
                )
        return packed

    def wanted(self, classes: int) -> NDArray[np.intp]:
        """The slots of the logits of one part: [C]."""
        repetition, j = np.divmod(np.arange(classes), self.products)
        return repetition * self.period + j


class TensealBsgsExchange:
    """One seeded ciphertext up, one ciphertext of a single prime down for each part of the head."""

    def __init__(self, head: Head) -> None:
        self._plan = plan = Plan.of(head.dimensions, head.classes)
        starts = range(0, head.classes, plan.rows)
        self._wanted = [plan.wanted(min(plan.rows, head.classes - start)) for start in starts]
        parms = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
        parms.set_poly_modulus_degree(DEGREE)
        parms.set_coeff_modulus(sealapi.CoeffModulus.Create(DEGREE, list(PRIME_BITS)))
        self._context = sealapi.SEALContext(parms, True, sealapi.SEC_LEVEL_TYPE.TC128)
        self._encoder = sealapi.CKKSEncoder(self._context)
        self._evaluator = sealapi.Evaluator(self._context)
        self._file = _MemoryFile()
        # The data owner: the secret, and keys of just these rotations.
        generator = sealapi.KeyGenerator(self._context)
        secret = generator.secret_key()
        self._encryptor = sealapi.Encryptor(self._context, secret)
        self._decryptor = sealapi.Decryptor(self._context, secret)
        steps = (*plan.baby_steps, *plan.giant_steps, *plan.gathering_steps)
        # A list given to SEAL holds Galois elements; rotating by s slots is that of 3^s.
        elements = [pow(3, step, 2 * DEGREE) for step in sorted(set(steps))]
        keys = self._file.save(generator.create_galois_keys(elements)) if elements else b""
        self.bytes_keys = len(keys)
        # The vendor: the client's keys, and the head encoded.
        self._keys = sealapi.GaloisKeys()
        if elements:
            self._file.load(self._keys, self._context, keys)
        first = self._context.first_parms_id()
        self._weights = [
            [
                [self._encoded(slots, first, 2.0**_WEIGHT_BITS) for slots in rows]
                for rows in plan.pack_weight(head.weight[start : start + plan.rows])
            ]
            for start in starts
        ]
        self._offsets = np.zeros((plan.parts, SLOTS), dtype=np.complex128)
        for offsets, wanted, start in zip(self._offsets, self._wanted, starts, strict=True):
            offsets[wanted] = head.bias[start : start + plan.rows]
        self._biases: list[Any] = []  # encoded when the first result shows its level and scale

    @property
    def parameters(self) -> str:
        """Degree, primes and rotations."""
        plan = self._plan
        primes = "/".join(map(str, PRIME_BITS))
        return f"N={DEGREE}, primes {primes}, {plan.rotations} rotations"

    @property
    def note(self) -> str:
        """How it is done."""
        plan = self._plan
        return (
            f"{plan.products} products, baby {plan.baby}, giant {plan.giant}, "
            f"{len(plan.gathering_steps)} gathering rotations; the head is not hidden"
        )

    def encrypt(self, embeddings: NDArray[np.float64]) -> Messages:
        """A seeded ciphertext for each row."""
        return tuple(map(self._encrypt, embeddings))

    def _encrypt(self, embedding: NDArray[np.float64]) -> bytes:
        slots = self._plan.pack_embedding(embedding)
        plaintext = self._encoded(slots, self._context.first_parms_id(), 2.0**_QUERY_BITS)
        return self._file.save(self._encryptor.encrypt_symmetric(plaintext))

    def evaluate(self, requests: Messages) -> Messages:
        """The ciphertexts of each request, one after the other."""
        return tuple(map(self._evaluate, requests))

    def _evaluate(self, request: bytes) -> bytes:
        query = sealapi.Ciphertext()
        self._file.load(query, self._context, request)
        turned = [query, *(self._rotated(query, step) for step in self._plan.baby_steps)]
        results = [self._result(turned, weights) for weights in self._weights]
        if not self._biases:
            self._biases = [
                self._encoded(offsets, results[0].parms_id(), results[0].scale)
                for offsets in self._offsets
            ]
        for result, bias in zip(results, self._biases, strict=True):
            self._evaluator.add_plain_inplace(result, bias)
        saved = [self._file.save(result) for result in results]
        return b"".join(_LENGTH.pack(len(part)) + part for part in saved)

    def _result(self, turned: list[Any], rows: list[list[Any]]) -> Any:
        """The sums of one part, without the biases."""
        total = None
        for step, weights in zip((0, *self._plan.giant_steps), rows, strict=True):
            part = self._product(turned, weights)
            part = self._rotated(part, step) if step else part
            if total is None:
                total = part
            else:
                self._evaluator.add_inplace(total, part)
        for step in self._plan.gathering_steps:
            self._evaluator.add_inplace(total, self._rotated(total, step))
        return total

    def _product(self, turned: list[Any], weights: list[Any]) -> Any:
        """The sum of rotated queries times their weights, its modulus cut by one prime."""
        total = None
        for query, weight in zip(turned, weights, strict=True):
            product = sealapi.Ciphertext()
            self._evaluator.multiply_plain(query, weight, product)
            if total is None:
                total = product
            else:
                self._evaluator.add_inplace(total, product)
        self._evaluator.rescale_to_next_inplace(total)
        return total

    def _rotated(self, ciphertext: Any, step: int) -> Any:
        turned = sealapi.Ciphertext()
        self._evaluator.rotate_vector(ciphertext, step, self._keys, turned)
        return turned

    def _encoded(self, slots: NDArray[np.complex128], parms_id: list[int], scale: float) -> Any:
        plaintext = sealapi.Plaintext()
        self._encoder.encode(slots.tolist(), parms_id, scale, plaintext)
        return plaintext

    def decrypt(self, replies: Messages) -> NDArray[np.float64]:
        """Logits [batch, C]."""
        return np.stack([self._decrypt(reply) for reply in replies])

    def _decrypt(self, reply: bytes) -> NDArray[np.float64]:
        found, start = [], 0
        for wanted in self._wanted:
            (length,) = _LENGTH.unpack_from(reply, start)
            start += _LENGTH.size
            ciphertext, plaintext = sealapi.Ciphertext(), sealapi.Plaintext()
            self._file.load(ciphertext, self._context, reply[start : start + length])
            start += length
            self._decryptor.decrypt(ciphertext, plaintext)
            found.append(np.array(self._encoder.decode_complex(plaintext))[wanted].real)
        return np.concatenate(found)


class _MemoryFile:
    """A file without a disk: SEAL's objects are saved to paths only."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("tenseal-bsgs", os.MFD_CLOEXEC)
        self._path = f"/proc/self/fd/{self._descriptor}"

    def __del__(self) -> None:
        os.close(self._descriptor)

    def save(self, seal_object: Any) -> bytes:
        seal_object.save(self._path)
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)

    def load(self, seal_object: Any, context: Any, data: bytes) -> None:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)
        seal_object.load(context, self._path)


def _power(number: int) -> int:
    """The least power of two that is not smaller."""
    return int(1 << (number - 1).bit_length())
