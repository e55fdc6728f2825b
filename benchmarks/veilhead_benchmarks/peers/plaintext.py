"""The same head without any privacy: numpy's product, from bytes to bytes. It is the floor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from veilhead_benchmarks.heads import Head, Messages


class PlaintextExchange:
    """Float32 embeddings up, float32 logits down."""

    parameters = "numpy float32"
    bytes_keys = 0
    note = "no privacy: the floor"

    def __init__(self, head: Head) -> None:
        self._weight = np.ascontiguousarray(head.weight.T, dtype=np.float32)  # [d, C]
        self._bias = head.bias.astype(np.float32)

    def encrypt(self, embeddings: NDArray[np.float64]) -> Messages:
        """The embeddings' bytes, as they are."""
        return (embeddings.astype("<f4").tobytes(),)

    def evaluate(self, requests: Messages) -> Messages:
        """The logits' bytes."""
        return tuple(answer(request, self._weight, self._bias) for request in requests)

    def decrypt(self, replies: Messages) -> NDArray[np.float64]:
        """Logits [batch, C]."""
        return np.concatenate(
            [np.frombuffer(reply, "<f4").reshape(-1, len(self._bias)) for reply in replies]
        ).astype(np.float64)


def answer(request: bytes, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> bytes:
    """The bytes of float32 logits for those of float32 embeddings; weight is [d, C]."""
    embeddings = np.frombuffer(request, "<f4").reshape(-1, len(weight))
    logits: NDArray[np.float32] = embeddings @ weight + bias
    return logits.astype("<f4").tobytes()
