"""Differentially private training of a linear head on frozen embeddings.

Full-batch gradient descent on the softmax loss, from zeros. The gradient of one row is an outer
product, (p - y) (x, b), so that its norm is the product of two norms, and clipping it costs
nothing. What is published follows from noised sums of clipped gradients alone.

The guarantee is one of integers. Both factors are rounded towards zero onto a grid before they are
summed, so that the sums are exact, whatever order they are computed in, and no row adds more than
the sensitivity. Logits are exact sums as well, so that what a row adds does not depend on the
others, not even in its last bit. The noise is a discrete Gaussian of OpenDP's on the same grid,
drawn exactly from a cryptographic generator. Rounding of floating-point numbers, which has broken
textbook mechanisms (Mironov, CCS 2012), therefore has no way in.

The number of rows is private too under add-remove adjacency: it is counted with noise, at one
hundredth of the budget's mu^2. Every constant below was fixed on public rows: chosen on
icd10-chapters, and confirmed against others on training rows of it and of cfpb (docs/privacy.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from veilhead_models.privacy import (
    PrivacyBudget,
    PrivacyStatement,
    Release,
    Unit,
    missing_package,
)
from veilhead_protocol.errors import DatasetError
from veilhead_protocol.scales import project

#: Noised steps.
STEPS: Final = 40

#: Largest Euclidean norm of a row's gradient.
CLIP_NORM: Final = 1.0

#: The input of the bias: less than one, or the bias would take much of every clipped gradient.
BIAS_INPUT: Final = 0.3

#: A step is this times the number of classes, since gradients fall by that number, ...
STEP_PER_CLASS: Final = 4.0

#: ... unless noise of a larger standard deviation than this would then be in a logit.
LOGIT_NOISE: Final = 0.5

#: Noise of the count of rows, relative to all noise: its mu is this share of the budget's.
COUNT_SHARE: Final = 0.1

#: Bits after the point of embeddings, of residuals, and of parameters where logits are computed.
#: A sum of `_CHUNK` products of the first two stays below 2^53, where 64-bit floats are exact
#: integers; so does a logit, as long as parameters are bounded.
FEATURE_BITS: Final = 20
RESIDUAL_BITS: Final = 16
_PARAMETER_BITS: Final = 16
_LARGEST_PARAMETER: Final = 64.0
_CHUNK: Final = 2**15

#: What a sum counts in: one is this many.
GRID: Final = 2.0 ** (FEATURE_BITS + RESIDUAL_BITS)

#: Makes noise: standard deviation and number of values in, integers out.
Noise = Callable[[float, int], NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class PrivateFit:
    """A privately trained head.

    Attributes:
        weight: [C, d], for embeddings in the unit ball.
        bias: [C].
        statement: what is guaranteed.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    statement: PrivacyStatement

    def __repr__(self) -> str:
        return f"PrivateFit(epsilon={self.statement.epsilon:g}, delta={self.statement.delta:g})"


@dataclass(frozen=True)
class Descent:
    """How noised sums become a head. It sees nothing else, and costs no privacy.

    Attributes:
        step_per_class: the step by number of classes, ...
        logit_noise: ... unless noise of a larger standard deviation than this would be in a logit.
        momentum: share of a step that the next one repeats.
        averaged: last steps whose parameters are averaged.
    """

    step_per_class: float = STEP_PER_CLASS
    logit_noise: float = LOGIT_NOISE
    momentum: float = 0.0
    averaged: int = 1


class GradientSums(Protocol):
    """Sums of clipped gradients as exact integers, whose units are 1 by `GRID`.

    One unit of privacy changes a sum by at most `clip_norm` in Euclidean norm, whatever the
    parameters are.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(C, d + 1): of the parameters and of a sum; the last column is the bias's."""

    @property
    def count(self) -> int:
        """How many units of privacy there are: private."""

    @property
    def clip_norm(self) -> float:
        """Largest Euclidean norm of what one unit adds."""

    def at(self, parameters: NDArray[np.float64]) -> NDArray[np.int64]:
        """The sum [C, d + 1] at parameters [C, d + 1]."""


def discrete_gaussian(scale: float, count: int) -> NDArray[np.int64]:
    """`count` exact draws of the discrete Gaussian of this scale, from OpenDP: [count].

    Raises:
        ModelError: when OpenDP is not installed.
    """
    try:
        import opendp.prelude as opendp
    except ImportError as error:
        raise missing_package(error) from error
    opendp.enable_features("contrib")
    space = opendp.vector_domain(opendp.atom_domain(T="i64")), opendp.l2_distance(T="f64")
    measurement = opendp.m.make_gaussian(*space, scale=scale)
    return np.array(measurement([0] * count), dtype=np.int64)


def fit_private_head(
    embeddings: NDArray[np.float64],
    targets: NDArray[np.intp],
    classes: int,
    budget: PrivacyBudget,
    *,
    insecure_noise: Noise | None = None,
) -> PrivateFit:
    """Train a head of so many classes under a budget. Two runs give two heads.

    Args:
        embeddings: [rows, d]; what is outside the unit ball is projected onto it.
        targets: [rows], classes by number.
        classes: C, public.
        budget: for which there may be too few rows: `PrivacyBudget.check_rows` says so.
        insecure_noise: noise in place of the exact sampler's, for experiments. The statement does
            not hold for it.

    Raises:
        DatasetError: when an embedding is not finite.
        PrivacyError: when the accounts do not agree with the budget.
        ModelError: when OpenDP or dp-accounting is not installed.
    """
    if not np.isfinite(embeddings).all():
        raise DatasetError("an embedding holds NaN or infinity, expected finite numbers")
    return descend(ClippedSums(embeddings, targets, classes), budget, insecure_noise=insecure_noise)


def descend(
    sums: GradientSums,
    budget: PrivacyBudget,
    *,
    descent: Descent | None = None,
    unit: Unit = "row",
    insecure_noise: Noise | None = None,
) -> PrivateFit:
    """The head that noised steps along these sums lead to, from zeros.

    Args:
        sums: of clipped gradients, one for each unit of privacy.
        budget: as in `fit_private_head`.
        descent: how to go along them; `Descent()` when it is None.
        unit: what a unit of privacy is.
        insecure_noise: as in `fit_private_head`.

    Raises:
        PrivacyError: when the accounts do not agree with the budget.
        ModelError: when OpenDP or dp-accounting is not installed.
    """
    noise = discrete_gaussian if insecure_noise is None else insecure_noise
    descent = Descent() if descent is None else descent
    count = Release(1 / (COUNT_SHARE * budget.mu))
    step = Release(math.sqrt(STEPS / (1 - COUNT_SHARE**2)) / budget.mu, STEPS)
    # Before the noise is drawn: a run that breaks its budget must not end in a head.
    statement = PrivacyStatement.of_run(
        budget, steps=step, count=count, clip_norm=sums.clip_norm, unit=unit
    )
    units = max(1.0, sums.count + noise(count.noise_multiplier * GRID, 1)[0] / GRID)
    rate = step_size(
        sums.shape[0],
        units,
        budget.mu,
        clip_norm=sums.clip_norm,
        step_per_class=descent.step_per_class,
        logit_noise=descent.logit_noise,
    )
    parameters = np.zeros(sums.shape)  # [C, d + 1]
    direction, mean = np.zeros(sums.shape), np.zeros(sums.shape)  # [C, d + 1] each
    scale = step.noise_multiplier * sums.clip_norm * GRID
    for number in range(STEPS):
        noised = sums.at(parameters) + noise(scale, parameters.size).reshape(sums.shape)
        direction = descent.momentum * direction + (1 - descent.momentum) * (noised / GRID)
        parameters -= rate / units * direction
        if number >= STEPS - descent.averaged:
            mean += parameters / descent.averaged
    return PrivateFit(
        weight=mean[:, :-1].copy(),
        bias=mean[:, -1] * BIAS_INPUT,
        statement=statement,
    )


def step_size(
    classes: int,
    units: float,
    mu: float,
    *,
    clip_norm: float = CLIP_NORM,
    step_per_class: float = STEP_PER_CLASS,
    logit_noise: float = LOGIT_NOISE,
) -> float:
    """The step, by public figures and the noised number of units of privacy.

    After all steps, the noise in a weight has the standard deviation steps * step * clip norm /
    (mu * units), and so has the one in the logit of an embedding of norm one.
    """
    return min(step_per_class * classes, logit_noise * mu * units / (clip_norm * STEPS))


def grid_inputs(embeddings: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Embeddings [rows, d] in the unit ball, and the bias's input: integers [rows, d + 1]."""
    rows, dimensions = embeddings.shape
    inputs = np.full((rows, dimensions + 1), BIAS_INPUT)  # [rows, d + 1]
    inputs[:, :-1] = project(embeddings.astype(np.float64), 1.0)
    return np.trunc(inputs * 2.0**FEATURE_BITS)


def grid_parameters(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
    """Parameters [C, d + 1], bounded, as integers: what logits are computed with."""
    bounded = np.clip(parameters, -_LARGEST_PARAMETER, _LARGEST_PARAMETER)
    return np.trunc(bounded * 2.0**_PARAMETER_BITS)


def softmax_residuals(
    inputs: NDArray[np.float64], parameters: NDArray[np.float64], targets: NDArray[np.intp]
) -> NDArray[np.float64]:
    """p - y [rows, C] of inputs [rows, d + 1] and parameters [C, d + 1], both integers."""
    logits = (inputs @ parameters.T) / 2.0 ** (FEATURE_BITS + _PARAMETER_BITS)  # [rows, C]
    logits -= logits.max(axis=1, keepdims=True)
    residuals: NDArray[np.float64] = np.exp(logits)  # [rows, C]
    residuals /= residuals.sum(axis=1, keepdims=True)
    residuals[np.arange(len(targets)), targets] -= 1
    return residuals


class ClippedSums:
    """Sums over rows of clipped gradients: what `GradientSums` says, of rows.

    Attributes:
        shape: (C, d + 1).
        count: rows.
    """

    clip_norm: Final = CLIP_NORM

    def __init__(
        self, embeddings: NDArray[np.float64], targets: NDArray[np.intp], classes: int
    ) -> None:
        rows, dimensions = embeddings.shape
        self.shape = (classes, dimensions + 1)
        self.count = rows
        self._inputs = grid_inputs(embeddings)  # [rows, d + 1], integers
        self._squares = (self._inputs**2).sum(axis=1)  # [rows], exact: below 2^53
        self._norms = np.sqrt(self._squares) / 2.0**FEATURE_BITS  # [rows], at least the bias's
        self._targets = targets

    def at(self, parameters: NDArray[np.float64]) -> NDArray[np.int64]:
        """The sum [C, d + 1] at parameters [C, d + 1]."""
        rounded = grid_parameters(parameters)  # [C, d + 1], integers
        total = np.zeros(self.shape, dtype=np.int64)
        for start in range(0, len(self._targets), _CHUNK):
            rows = slice(start, start + _CHUNK)
            residuals = self._residuals(rows, rounded)  # [chunk, C], integers
            # Integers in floats, for the speed of BLAS: no partial sum reaches 2^53.
            total += (residuals.T @ self._inputs[rows]).astype(np.int64)
        return total

    def _residuals(self, rows: slice, parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        """p - y of a chunk of rows, clipped and rounded towards zero: [chunk, C], integers."""
        inputs, targets = self._inputs[rows], self._targets[rows]
        residuals = softmax_residuals(inputs, parameters, targets)  # [chunk, C]
        norms = np.linalg.norm(residuals, axis=1) * self._norms[rows]  # [chunk]
        clipped = np.minimum(1.0, CLIP_NORM / np.maximum(norms, CLIP_NORM))  # [chunk]
        # A little less, so that no rounding on the way here can exceed the clip norm ...
        clipped *= 2.0**RESIDUAL_BITS * (1 - 2.0**-30)
        residuals = np.trunc(residuals * clipped[:, np.newaxis])
        # ... and checked on the integers themselves, which also drops what overflowed to NaN.
        squares = (residuals**2).sum(axis=1) * self._squares[rows]  # [chunk]
        inside = squares <= (CLIP_NORM * GRID) ** 2
        return np.where(inside[:, np.newaxis], residuals, 0.0)
