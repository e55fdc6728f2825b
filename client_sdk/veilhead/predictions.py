"""Logits -> labels and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Prediction:
    """One label and its score: a probability in [0, 1] by softmax over the rounded logits.

    A head with a single logit has one label, whose score is the logit's sigmoid.
    """

    label: str
    score: float


def scores(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities [..., C] of logits [..., C]."""
    if logits.shape[-1] == 1:
        sigmoid: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-logits))
        return sigmoid
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    softmax: NDArray[np.float64] = shifted / shifted.sum(axis=-1, keepdims=True)
    return softmax


def predictions(
    logits: NDArray[np.float64], labels: Sequence[str], top_k: int | None
) -> list[Prediction]:
    """The `top_k` best labels of logits [C], best first; all of them for None."""
    probabilities = scores(logits)
    # Stable: equal logits keep the order of the labels.
    order = np.argsort(-logits, kind="stable")[:top_k]
    return [Prediction(labels[index], float(probabilities[index])) for index in order]
