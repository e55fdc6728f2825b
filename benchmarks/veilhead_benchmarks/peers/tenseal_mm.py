"""TenSEAL's own encrypted vector times plaintext matrix: `CKKSVector.mm`.

Calls are those of TenSEAL's tutorials, with the shortest chain that one product allows (degree
8192, primes of 60, 40 and 60 bits, scale 2^40): the tutorials' longer one is slower. `mm` rotates,
so the service needs Galois keys.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import tenseal
from numpy.typing import NDArray

from veilhead_benchmarks.heads import Head, Messages

DEGREE: Final = 8192
PRIME_BITS: Final = (60, 40, 60)
SCALE: Final = 2.0**40


class TensealMmExchange:
    """One encrypted vector a text: `mm` takes no batch."""

    parameters = f"N={DEGREE}, primes {'/'.join(map(str, PRIME_BITS))}"
    note = "CKKSVector.mm; one request for every text"

    def __init__(self, head: Head) -> None:
        # The data owner: all the keys.
        self._context: Any = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS,
            poly_modulus_degree=DEGREE,
            coeff_mod_bit_sizes=list(PRIME_BITS),
            n_threads=1,
        )
        self._context.global_scale = SCALE
        self._context.generate_galois_keys()
        keys = self._context.serialize(save_secret_key=False, save_relin_keys=False)
        self.bytes_keys = len(keys)
        # The vendor: the head in plaintext, and the public context.
        self._public: Any = tenseal.context_from(keys, n_threads=1)
        self._weight = head.weight.T.tolist()
        self._bias = head.bias.tolist()

    def encrypt(self, embeddings: NDArray[np.float64]) -> Messages:
        """An encrypted vector [d] for each row."""
        return tuple(
            tenseal.ckks_vector(self._context, row.tolist()).serialize() for row in embeddings
        )

    def evaluate(self, requests: Messages) -> Messages:
        """An encrypted vector [C] for each request."""
        return tuple(map(self._evaluate, requests))

    def _evaluate(self, request: bytes) -> bytes:
        vector = tenseal.ckks_vector_from(self._public, request)
        reply: bytes = (vector.mm(self._weight) + self._bias).serialize()
        return reply

    def decrypt(self, replies: Messages) -> NDArray[np.float64]:
        """Logits [batch, C]."""
        return np.array(
            [tenseal.ckks_vector_from(self._context, reply).decrypt() for reply in replies]
        )
