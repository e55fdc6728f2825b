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

DEGREE: Final = 8192
PRIME_BITS: Final = (60, 40, 60)
SCALE: Final = 2.0**40


class TensealClient:
    """The data owner: keys, encryption, decryption."""

    def __init__(self) -> None:
        self._context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS,
            poly_modulus_degree=DEGREE,
            coeff_mod_bit_sizes=list(PRIME_BITS),
            n_threads=1,
        )
        self._context.global_scale = SCALE
        self._context.generate_galois_keys()

    def evaluation_keys(self) -> bytes:
        """The public context with the Galois keys, as it goes to the service."""
        keys: bytes = self._context.serialize(save_secret_key=False, save_relin_keys=False)
        return keys

    def encrypt(self, embedding: NDArray[np.float64]) -> bytes:
        """The encrypted embedding [d]."""
        query: bytes = tenseal.ckks_vector(self._context, embedding.tolist()).serialize()
        return query

    def decrypt(self, reply: bytes) -> NDArray[np.float64]:
        """Logits [C]."""
        return np.array(tenseal.ckks_vector_from(self._context, reply).decrypt())


class TensealService:
    """The vendor: the head [C, d] in plaintext, and the client's evaluation keys."""

    def __init__(self, keys: bytes, weight: NDArray[np.float64], bias: NDArray[np.float64]) -> None:
        self._context: Any = tenseal.context_from(keys, n_threads=1)
        self._weight = weight.T.tolist()
        self._bias = bias.tolist()

    def evaluate(self, query: bytes) -> bytes:
        """From the bytes of a query to those of its reply."""
        vector = tenseal.ckks_vector_from(self._context, query)
        reply: bytes = (vector.mm(self._weight) + self._bias).serialize()
        return reply
