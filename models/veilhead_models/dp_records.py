"""Differentially private training of a token head: the unit of privacy is a record.

A record is a text with all of its tokens. Its gradient is a weighted mean over its tokens of
(p - y) (x, b), no outer product any more, and it is clipped as a whole: what a record may change
does not depend on how many tokens it has, and neither does anything that is published. How many
tokens there are in all is never used.

As in `dp_training`, all sums are exact. Residuals are rounded towards zero to integers, so that the
sum over a record's tokens is one, in whatever order it is computed. The mean is rounded to 24 bits
after the point, of which its squared norm is an exact integer, too. Clipping is then done number by
number, rounds towards zero and is checked on the integers.

The constants were fixed on generated records (`veilhead_benchmarks.deidentify_records`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from veilhead_models.dp_training import (
    FEATURE_BITS,
    GRID,
    RESIDUAL_BITS,
    STEPS,
    Descent,
    Noise,
    PrivateFit,
    descend,
    grid_inputs,
    grid_parameters,
    softmax_residuals,
)
from veilhead_models.privacy import PrivacyBudget
from veilhead_protocol.errors import DatasetError

#: Largest Euclidean norm of a record's gradient.
RECORD_CLIP_NORM: Final = 0.1

#: Kinds have few of a record's tokens, and small gradients: larger steps than those for rows, with
#: momentum, and a mean over the second half of them, which undoes what large steps swing by.
RECORD_DESCENT: Final = Descent(
    step_per_class=80.0, logit_noise=2.0, momentum=0.8, averaged=STEPS // 2
)

#: What a token outside of every entity weighs in the gradient of its record; others weigh one. Most
#: tokens are outside, and would drown the others.
OUTSIDE_WEIGHT: Final = 0.5

#: Bits after the point of a record's gradient. Its entries are below 2, and their squares add up to
#: less than 2^53, where 64-bit floats are exact integers.
_GRADIENT_BITS: Final = 24

#: A longer record is refused: beyond it the sum over its tokens could leave 2^53.
MAX_TOKENS: Final = 2**13

#: Embeddings [tokens, d] of a record's tokens, and their classes by number [tokens].
TokenRows = tuple[NDArray[np.floating[Any]], NDArray[np.intp]]

#: Records whose gradients are held at once.
_CHUNK: Final = 256


def fit_private_tagger(
    records: Sequence[TokenRows],
    classes: int,
    budget: PrivacyBudget,
    *,
    insecure_noise: Noise | None = None,
) -> PrivateFit:
    """Train a head for tokens under a budget for records. Two runs give two heads.

    Args:
        records: the tokens of each; what is outside the unit ball is projected onto it.
        classes: C, public.
        budget: for which there may be too few records: `PrivacyBudget.check_rows` says so.
        insecure_noise: as in `fit_private_head`.

    Raises:
        DatasetError: when there is no record, one has too many tokens, or an embedding is not
            finite.
        PrivacyError: when the accounts do not agree with the budget.
        ModelError: when OpenDP or dp-accounting is not installed.
    """
    sums = ClippedRecords(records, classes)
    return descend(
        sums, budget, descent=RECORD_DESCENT, unit="record", insecure_noise=insecure_noise
    )


class ClippedRecords:
    """Sums over records of clipped gradients: what `GradientSums` says, of records.

    Attributes:
        shape: (C, d + 1).
        count: records.
    """

    clip_norm: Final = RECORD_CLIP_NORM

    def __init__(self, records: Sequence[TokenRows], classes: int) -> None:
        if not records:
            raise DatasetError("got no records to train on, expected at least one")
        for number, (embeddings, targets) in enumerate(records, start=1):
            if len(targets) > MAX_TOKENS:
                raise DatasetError(
                    f"record {number} has {len(targets)} tokens, expected at most {MAX_TOKENS}"
                )
            if not np.isfinite(embeddings).all():
                raise DatasetError(
                    f"record {number}: an embedding holds NaN or infinity, expected finite numbers"
                )
        self.shape = (classes, records[0][0].shape[1] + 1)
        self.count = len(records)
        # Integers of 20 bits: single precision holds them, in half the memory.
        self._inputs = [
            grid_inputs(embeddings).astype(np.float32)
            for embeddings, _ in records  # [tokens, d + 1] each
        ]
        self._targets = [targets for _, targets in records]  # [tokens] each

    def at(self, parameters: NDArray[np.float64]) -> NDArray[np.int64]:
        """The sum [C, d + 1] at parameters [C, d + 1]."""
        rounded = grid_parameters(parameters)  # [C, d + 1], integers
        total = np.zeros(self.shape, dtype=np.int64)
        for start in range(0, self.count, _CHUNK):
            total += _clipped(self._means(slice(start, start + _CHUNK), rounded)).sum(axis=0)
        return total * round(GRID / 2.0**_GRADIENT_BITS)

    def _means(self, chosen: slice, parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        """Means over tokens of the gradients, by record: integers [records, C, d + 1].

        No entry, and no root of the sum of all squares of a record, exceeds 2 * 2^24.
        """
        targets = self._targets[chosen]
        counts = [len(of_one) for of_one in targets]
        inputs = np.concatenate(self._inputs[chosen]).astype(np.float64)  # [tokens, d + 1]
        residuals = softmax_residuals(inputs, parameters, np.concatenate(targets))  # [tokens, C]
        weights = np.where(np.concatenate(targets) == 0, OUTSIDE_WEIGHT, 1.0)  # [tokens]
        residuals = np.trunc(residuals * (weights[:, np.newaxis] * 2.0**RESIDUAL_BITS))
        means = np.zeros((len(counts), *self.shape))
        end = 0
        for place, tokens in enumerate(counts):
            start, end = end, end + tokens
            # Integers in floats: below 2^(13 + 16 + 21), whatever the order of the sum.
            summed = residuals[start:end].T @ inputs[start:end]  # [C, d + 1]
            means[place] = summed / max(OUTSIDE_WEIGHT, weights[start:end].sum())
        shift = FEATURE_BITS + RESIDUAL_BITS - _GRADIENT_BITS
        return np.trunc(means / 2.0**shift)


def _clipped(gradients: NDArray[np.float64]) -> NDArray[np.int64]:
    """Gradients [records, C, d + 1], integers, clipped in norm and rounded towards zero."""
    bound = RECORD_CLIP_NORM * 2.0**_GRADIENT_BITS
    squares = (gradients**2).sum(axis=(1, 2))  # [records], exact: below 2^53
    norms = np.sqrt(squares)
    # A little less, so that no rounding on the way here can exceed the clip norm ...
    factors = bound * (1 - 2.0**-30) / np.maximum(norms, bound)
    clipped = np.trunc(gradients * factors[:, np.newaxis, np.newaxis])
    # ... and checked on the integers themselves, which also drops what overflowed to NaN.
    inside = (clipped**2).sum(axis=(1, 2)) <= bound**2
    return np.where(inside[:, np.newaxis, np.newaxis], clipped, 0.0).astype(np.int64)
