"""Logits -> labels and scores, in the shapes of the transformers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from veilhead_protocol.manifest import HeadSection

#: What makes scores of logits; the names are those of the transformers pipeline.
FunctionToApply = Literal["softmax", "sigmoid", "none"]

_FUNCTIONS: Final[tuple[FunctionToApply, ...]] = get_args(FunctionToApply)

#: exp(-690) is 2e-300. Beyond it a score is 0, and no number is subnormal: those are slow, and the
#: service chooses what a reply decrypts to.
_MOST_EXPONENT: Final = 690.0


@dataclass(frozen=True)
class Prediction:
    """One label and its score.

    The score is a probability in [0, 1] by softmax over the labels or by the sigmoid of the label's
    own logit, or the rounded logit itself, as `function_to_apply` says.
    """

    label: str
    score: float

    def to_dict(self) -> dict[str, str | float]:
        """What the transformers pipeline gives: `{"label": ..., "score": ...}`."""
        return {"label": self.label, "score": self.score}


@dataclass(frozen=True)
class Shape:
    """How logits become predictions: how many of the labels, and which scores.

    Attributes:
        labels: the labels, in the order of the logits.
        top_k: predictions for each text; None for all.
        function: what makes scores of logits.
    """

    labels: tuple[str, ...]
    top_k: int | None
    function: FunctionToApply

    @classmethod
    def of(cls, head: HeadSection, top_k: int | None, function: str | None) -> Shape:
        """The shape that a caller asked for; no function is the one of the head's problem type.

        Raises:
            ValueError: when `top_k` or the function is not one.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {top_k}")
        if function is None:
            return cls(head.labels, top_k, default_function(head))
        for known in _FUNCTIONS:
            if function == known:
                return cls(head.labels, top_k, known)
        raise ValueError(
            f"function_to_apply must be one of {', '.join(_FUNCTIONS)} or None, got {function!r}"
        )

    def predictions(self, logits: NDArray[np.float64]) -> list[Prediction]:
        """The predictions of logits [C], best first."""
        return predictions(logits, self.labels, self.top_k, self.function)


def default_function(head: HeadSection) -> FunctionToApply:
    """The function of a head when the caller names none: that of the transformers pipeline."""
    if head.problem_type == "regression":
        return "none"
    if head.problem_type == "multi_label" or len(head.labels) == 1:
        return "sigmoid"
    return "softmax"


def scores(logits: NDArray[np.float64], function: FunctionToApply) -> NDArray[np.float64]:
    """Scores [..., C] of logits [..., C], in a time that does not depend on them."""
    if function == "none":
        return logits
    if function == "sigmoid":
        return _exponentials(logits) / (1.0 + _exponentials(logits))
    exponentials = _exponentials(logits - logits.max(axis=-1, keepdims=True))
    softmax: NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return softmax


def _exponentials(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp of values; of those beyond the largest exponent that of the largest, or 0."""
    bounded = np.exp(np.clip(values, -_MOST_EXPONENT, _MOST_EXPONENT))
    return np.where(values < -_MOST_EXPONENT, 0.0, bounded)


def predictions(
    logits: NDArray[np.float64],
    labels: Sequence[str],
    top_k: int | None,
    function: FunctionToApply = "softmax",
) -> list[Prediction]:
    """The `top_k` best labels of logits [C], best first; all of them for None."""
    values = scores(logits, function)
    # Equal logits keep the order of the labels either way. Sorting takes longer for some values
    # than for others; finding the largest does not.
    if top_k == 1:
        order = logits.argmax(axis=0, keepdims=True)
    else:
        order = np.argsort(-logits, kind="stable")[:top_k]
    return [Prediction(labels[index], float(values[index])) for index in order]
