"""One-run audit of differentially private training (Steinke, Nasr and Jagielski, NeurIPS 2023).

Rows of the auditor's own, canaries, are put into the training rows or left out, by fair coins. From
the published head the auditor guesses the coins, for the canaries it is surest of. Under (epsilon,
delta)-privacy the number of right guesses is bounded like that of coins of bias e^epsilon/(1 +
e^epsilon) (their theorem 5.2): more right guesses than that refute the claim, and give a lower
bound on epsilon at 95 % confidence. A bound above the claim catches a run whose noise is missing.

The auditor is the strongest there is: it knows every other row and trains the same head without
noise to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veilhead_benchmarks.attacks.data import embedded
from veilhead_benchmarks.attacks.results import AttackResult, above, at_most
from veilhead_models.dp_training import fit_private_head
from veilhead_models.privacy import PrivacyBudget

CONFIDENCE: Final = 0.95

#: Share of the canaries that are guessed, half of them `in` and half `out`.
GUESSED: Final = 0.25

_Array = NDArray[np.float64]

#: Trains: embeddings [rows, d] and targets [rows] in, weight [C, d] out.
Training = Callable[[_Array, NDArray[np.intp]], _Array]


@dataclass(frozen=True, eq=False)
class Canaries:
    """Rows that are easy to tell apart.

    No two of one class point in directions that are not orthogonal, so that every one leaves a
    trace of its own.

    Attributes:
        embeddings: [m, d], norm one.
        targets: [m].
    """

    embeddings: _Array
    targets: NDArray[np.intp]

    @classmethod
    def made(cls, count: int, dimensions: int, classes: int, seed: int) -> Canaries:
        """So many canaries, at most d times C.

        Raises:
            ValueError: when there are no so many.
        """
        if not 1 <= count <= dimensions * classes:
            raise ValueError(f"got {count} canaries, expected 1 to {dimensions * classes}")
        generator = np.random.default_rng(seed)
        directions, _ = np.linalg.qr(generator.normal(size=(dimensions, dimensions)))  # [d, d]
        numbers = np.arange(count)
        # Every direction once before any twice, each time with another class.
        first = generator.integers(0, classes, dimensions)  # [d]
        targets = (first[numbers % dimensions] + numbers // dimensions) % classes  # [m]
        return cls(directions.T[numbers % dimensions], targets.astype(np.intp))


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        canaries: m, coins that were thrown.
        guesses: r, coins that were guessed.
        right: v, guesses that were right.
        epsilon: the lower bound, at `CONFIDENCE`.
    """

    canaries: int
    guesses: int
    right: int
    epsilon: float


def audit_training(
    train: Training,
    train_quietly: Training,
    embeddings: _Array,
    targets: NDArray[np.intp],
    canaries: Canaries,
    *,
    delta: float,
    seed: int,
) -> Audit:
    """Audit one run of `train` on rows and canaries.

    Args:
        train: what is audited; called once.
        train_quietly: what the auditor compares with, on the rows without a canary.
        embeddings: [rows, d].
        targets: [rows].
        canaries: the auditor's own rows.
        delta: the delta that is claimed.
        seed: decides the coins.
    """
    count = len(canaries.targets)
    coins = np.random.default_rng(seed).random(count) < 0.5  # [m]
    weight = train(
        np.concatenate([embeddings, canaries.embeddings[coins]]),
        np.concatenate([targets, canaries.targets[coins]]),
    )
    difference = weight - train_quietly(embeddings, targets)  # [C, d]
    # How far the head moved towards each canary, against the other classes.
    moved = canaries.embeddings @ difference.T  # [m, C]
    scores = moved[np.arange(count), canaries.targets] - moved.mean(axis=1)  # [m]
    each = max(1, round(count * GUESSED / 2))
    order = scores.argsort()
    right = int(coins[order[-each:]].sum() + (~coins[order[:each]]).sum())
    return Audit(count, 2 * each, right, epsilon_bound(count, 2 * each, right, delta))


def epsilon_bound(
    canaries: int, guesses: int, right: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """The least epsilon that so many right guesses do not refute, at this delta; 0 for none."""
    low, high = 0.0, 1.0
    allowed = 1 - confidence
    if refutation(canaries, guesses, right, 0.0, delta) >= allowed:
        return 0.0
    while refutation(canaries, guesses, right, high, delta) < allowed:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        if refutation(canaries, guesses, right, middle, delta) < allowed:
            low = middle
        else:
            high = middle
    return low


def refutation(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are at most, under (epsilon, delta)-privacy."""
    from scipy.stats import binom

    bias = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, bias))
    if right == 0:
        return 1.0
    # P[right > guesses that coins get >= right - i], for i = 1 ... right.
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, bias))
    alpha = float((below / np.arange(1, right + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * alpha)


def no_noise(_scale: float, count: int) -> NDArray[np.int64]:
    """What an impostor adds."""
    return np.zeros(count, dtype=np.int64)


def run(*, short: bool) -> list[AttackResult]:
    """Audit honest runs at epsilon 1 and 4, and impostors that claim the same."""
    data = embedded("icd10-chapters")
    rows = 1500 if short else 5000
    return audit_claims(
        data.train[:rows],
        data.dataset.train.targets[:rows],
        data.classes,
        canaries=768 if short else 1536,
        epsilons=(1.0, 4.0),
    )


def audit_claims(
    embeddings: _Array,
    targets: NDArray[np.intp],
    classes: int,
    *,
    canaries: int,
    epsilons: tuple[float, ...],
) -> list[AttackResult]:
    """Results for each epsilon: an honest run, and one whose noise is silently off."""
    made = Canaries.made(canaries, embeddings.shape[1], classes, seed=1)
    results = []
    for epsilon in epsilons:
        budget = PrivacyBudget(epsilon)

        def honest(x: _Array, y: NDArray[np.intp], budget: PrivacyBudget = budget) -> _Array:
            return fit_private_head(x, y, classes, budget).weight

        def silent(x: _Array, y: NDArray[np.intp], budget: PrivacyBudget = budget) -> _Array:
            return fit_private_head(x, y, classes, budget, insecure_noise=no_noise).weight

        for name, train in (("honest run", honest), ("noise silently off", silent)):
            found = audit_training(
                train, silent, embeddings, targets, made, delta=budget.delta, seed=2
            )
            result = AttackResult(
                attack="dp-audit",
                system="veilhead" if train is honest else "plaintext",
                target=f"{name}, claims epsilon {epsilon:g}",
                metric=(
                    f"lower bound on epsilon at 95 % ({found.right} of {found.guesses} guesses "
                    "right)"
                ),
                value=found.epsilon,
                samples=found.canaries,
                curve=name,
                at=epsilon,
            )
            judge = at_most if train is honest else above
            results.append(judge(result, epsilon))
    return results
