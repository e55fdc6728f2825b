"""Why noise of standard deviation epsilon/n on the labels is no differential privacy.

The recipe has been published, with an epsilon beside it: add normal noise of standard deviation
epsilon/n to the labels, then train as usual. Nothing is clipped and no accountant is asked. The
noise shrinks with more rows and *grows* with epsilon, and no row's influence is bounded.

The attacker knows every row but one, as differential privacy lets it, and has two candidates for
that one. It trains both heads itself, without noise, and says whose head is nearer to the published
one. Under (epsilon, delta)-privacy it would be right in at most a share (e^epsilon + delta) /
(1 + e^epsilon) of fair trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from veilhead_benchmarks.attacks.data import embedded
from veilhead_benchmarks.attacks.dp_audit import no_noise
from veilhead_benchmarks.attacks.results import AttackResult, above, at_most
from veilhead_models.dp_training import fit_private_head
from veilhead_models.privacy import PrivacyBudget

_Array = NDArray[np.float64]
_Targets = NDArray[np.intp]

#: Trains a head on embeddings and targets, with noise or without: weight [C, d].
Training = Callable[[_Array, _Targets, bool], _Array]


def recipe(
    embeddings: _Array,
    targets: _Targets,
    classes: int,
    epsilon: float,
    generator: np.random.Generator | None,
) -> _Array:
    """The recipe's head: least squares, slightly regularised, on noised labels: [C, d].

    Without a generator, without noise.
    """
    labels = np.eye(classes)[targets]  # [rows, C]
    if generator is not None:
        labels += generator.normal(scale=epsilon / len(targets), size=labels.shape)
    gram = embeddings.T @ embeddings + np.eye(embeddings.shape[1])  # [d, d]
    solution = np.linalg.solve(gram, embeddings.T @ labels)  # [d, C]
    return np.asarray(solution.T, dtype=np.float64)


def share_told_apart(
    train: Training, embeddings: _Array, targets: _Targets, trials: int, seed: int
) -> float:
    """Share of fair trials in which the attacker names the right one of two data sets.

    One has all rows, the other lacks the last one.
    """
    candidates = [train(embeddings[:last], targets[:last], False) for last in (len(targets), -1)]
    coins = np.random.default_rng(seed).integers(0, 2, trials)
    right = 0
    for coin in coins.tolist():
        last = (len(targets), -1)[coin]
        published = train(embeddings[:last], targets[:last], True)
        distances = [float(((published - candidate) ** 2).sum()) for candidate in candidates]
        right += int(np.argmin(distances)) == coin
    return right / trials


def compare(
    embeddings: _Array, targets: _Targets, classes: int, *, epsilon: float, trials: int
) -> list[AttackResult]:
    """The recipe and private training, both said to have this epsilon."""
    generator = np.random.default_rng(7)
    budget = PrivacyBudget(epsilon)
    limit = (math.exp(epsilon) + budget.delta) / (1 + math.exp(epsilon))

    def published(x: _Array, y: _Targets, noisy: bool) -> _Array:
        return recipe(x, y, classes, epsilon, generator if noisy else None)

    def private(x: _Array, y: _Targets, noisy: bool) -> _Array:
        noise = None if noisy else no_noise
        return fit_private_head(x, y, classes, budget, insecure_noise=noise).weight

    def result(system: str, target: str, value: float) -> AttackResult:
        return AttackResult(
            attack="label-noise",
            system=system,
            target=f"{target}, {len(targets)} rows, said to be epsilon {epsilon:g}",
            metric="share of neighbours told apart",
            value=value,
            samples=trials,
            chance=0.5,
        )

    told = share_told_apart(published, embeddings, targets, trials, seed=3)
    kept = share_told_apart(private, embeddings, targets, trials, seed=4)
    spread = 4 * math.sqrt(limit * (1 - limit) / trials)
    return [
        above(result("plaintext", "noise of deviation epsilon/n on the labels", told), 0.99),
        at_most(result("veilhead", "private training", kept), limit + spread),
    ]


def run(*, short: bool) -> list[AttackResult]:
    """On 400 rows of two chapters of icd10-chapters."""
    data = embedded("icd10-chapters")
    targets = data.dataset.train.targets
    chosen = np.flatnonzero(targets < 2)[:400]
    return compare(data.train[chosen], targets[chosen], 2, epsilon=1.0, trials=20 if short else 60)
