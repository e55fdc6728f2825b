"""TenSEAL's batched tensor: `ckks_tensor(..., batch=True)` times a plaintext matrix.

The batch lies in the slots of one ciphertext for every feature, so nothing rotates and the service
needs no Galois keys. A request is d ciphertexts, whatever the batch; its size is the price. Calls
are those of TenSEAL's tutorials, with the shortest chain that one product allows at their degree.
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

#: Texts that fit into one request: the slots of a ciphertext.
MAX_BATCH: Final = DEGREE // 2


class TensealBatchedExchange:
    """One encrypted tensor [batch, d], the batch in the slots."""

    parameters = f"N={DEGREE}, primes {'/'.join(map(str, PRIME_BITS))}"
    note = "ckks_tensor with batch=True"

    def __init__(self, head: Head) -> None:
        # The data owner: all the keys.
        self._context: Any = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS,
            poly_modulus_degree=DEGREE,
            coeff_mod_bit_sizes=list(PRIME_BITS),
            n_threads=1,
        )
        self._context.global_scale = SCALE
        # It insists on relinearisation keys, though nothing is relinearised.
        keys = self._context.serialize(save_secret_key=False, save_galois_keys=False)
        self.bytes_keys = len(keys)
        # The vendor: the head in plaintext, and the public context.
        self.public: Any = tenseal.context_from(keys, n_threads=1)
        self._weight = tenseal.plain_tensor(head.weight.T.tolist())
        self._bias = tenseal.plain_tensor(head.bias.tolist())

    def encrypt(self, embeddings: NDArray[np.float64]) -> Messages:
        """One encrypted tensor for all rows."""
        if len(embeddings) > MAX_BATCH:
            raise ValueError(f"got {len(embeddings)} rows, expected at most {MAX_BATCH}")
        # [batch, 1, d]: a product wants a matrix besides the batch.
        tensor = tenseal.plain_tensor(embeddings[:, np.newaxis, :].tolist())
        return (tenseal.ckks_tensor(self._context, tensor, batch=True).serialize(),)

    def evaluate(self, requests: Messages) -> Messages:
        """One encrypted tensor [batch, C]."""
        (request,) = requests
        tensor = tenseal.ckks_tensor_from(self.public, request)
        return ((tensor.mm(self._weight) + self._bias).serialize(),)

    def decrypt(self, replies: Messages) -> NDArray[np.float64]:
        """Logits [batch, C]."""
        (reply,) = replies
        tensor = tenseal.ckks_tensor_from(self._context, reply)
        return np.array(tensor.decrypt().tolist())[:, 0]  # [batch, 1, C] -> [batch, C]
