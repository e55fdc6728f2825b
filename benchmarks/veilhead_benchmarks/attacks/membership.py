"""Membership inference: was this text among the training rows? LiRA, with shadow heads.

Likelihood-ratio attack (Carlini et al., IEEE S&P 2022): heads are trained on random parts of one
pool, so that every row is in some and out of others. For each row, the confidences of the heads
that had it and of those that had not are two normal distributions, and the answer of the attacked
head is likelier under one of them. Every head is attacked in turn, with the others as shadows, and
all answers are pooled. Averages hide the few rows that are betrayed, hence the true-positive rate
at 0.1 % false positives.

The attacker here is strong: it knows the pool and the method, and reads unrounded logits. What it
finds it would find behind any service that returns logits, encrypted or not.

**What "within noise" means** was fixed before any head was judged by it. The answers of as many
heads as have `JUDGED_MEMBERS` members together are pooled, and the threshold is what one in a
thousand of their answers about others exceeds. The rate holds if the exact 95 % interval of the
true-positive rate contains 0.1 %. The threshold is estimated from as few answers as the rate, so
that the interval is that of the members' share among all answers above it (Clopper-Pearson):
where nothing can be told, that is a binomial share, however often a row is asked about, since who
is a member is drawn anew for every head. A head that tells nothing fails once in 40 times. A rate
of 0.3 % is noticed with probability 0.95, one of 0.2 % with 0.61. All heads are pooled too, where
there are more: that figure is sharper, and has no promise.

Epsilon 4 did not pass. There the promise is what the guarantee itself says: the mechanism is
Gaussian, of parameter mu, so that no attack on any row finds more than Phi(Phi^-1(0.001) + mu), and
the interval must not lie above that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veilhead_benchmarks.attacks.data import embedded
from veilhead_benchmarks.attacks.results import AttackResult, above, contains_chance, not_above
from veilhead_models.dp_training import fit_private_head
from veilhead_models.privacy import PrivacyBudget
from veilhead_models.training import fit_head
from veilhead_protocol.errors import PrivacyError

FALSE_POSITIVES: Final = 0.001

#: Answers about members that a rate is judged by: enough to notice one of 0.3 %.
JUDGED_MEMBERS: Final = 16_000

#: The largest epsilon whose rate is promised to be within noise.
WITHIN_NOISE_EPSILON: Final = 1.0

_CONFIDENCE: Final = 0.95

_Array = NDArray[np.float64]
_Targets = NDArray[np.intp]

#: Trains: embeddings and targets in, weight [C, d] and bias [C] out.
Training = Callable[[_Array, _Targets], tuple[_Array, _Array]]


@dataclass(frozen=True)
class Membership:
    """How well members are told from others.

    Attributes:
        auc: area under the curve; one half is chance.
        found: members above the threshold.
        members: answers about members.
        mistaken: others above the threshold, which is set so that they are `FALSE_POSITIVES`.
        others: answers about others.
    """

    auc: float
    found: int
    members: int
    mistaken: int
    others: int

    @classmethod
    def of_ratios(cls, members: _Array, others: _Array) -> Membership:
        """From likelihood ratios of answers about members, and about others."""
        mistaken = int(FALSE_POSITIVES * len(others))
        threshold = np.sort(others)[len(others) - 1 - mistaken]
        found = int((members > threshold).sum())
        return cls(_auc(members, others), found, len(members), mistaken, len(others))

    @property
    def true_positives(self) -> float:
        """Share of the members found at `FALSE_POSITIVES`."""
        return self.found / self.members

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true-positive rate is at 95 %: it contains `FALSE_POSITIVES` in 39 of 40 cases
        in which nothing can be told."""
        from scipy.stats import beta

        tail = (1 - _CONFIDENCE) / 2
        low, high = 0.0, 1.0
        # The members' share among all that are above the threshold, and the rate that makes it.
        if self.found:
            share = float(beta.ppf(tail, self.found, self.mistaken + 1))
            low = FALSE_POSITIVES * share / (1 - share) * self.others / self.members
        if self.mistaken:
            share = float(beta.isf(tail, self.found + 1, self.mistaken))
            high = FALSE_POSITIVES * share / (1 - share) * self.others / self.members
        return low, min(high, 1.0)


def confidences(embeddings: _Array, targets: _Targets, weight: _Array, bias: _Array) -> _Array:
    """ln(p / (1 - p)) of every row's own class: [rows]."""
    logits = embeddings @ weight.T + bias  # [rows, C]
    rows = np.arange(len(targets))
    own = logits[rows, targets].copy()
    logits[rows, targets] = -np.inf
    highest = logits.max(axis=1)
    rest: _Array = highest + np.log(np.exp(logits - highest[:, np.newaxis]).sum(axis=1))
    return own - rest


def train_shadows(
    train: Training,
    embeddings: _Array,
    targets: _Targets,
    *,
    rows: int,
    heads: int,
    classes: int,
    seed: int,
) -> tuple[_Array, NDArray[np.bool_]]:
    """Confidences [heads, pool] of heads on random parts of a pool, and who was in: the same."""
    generator = np.random.default_rng(seed)
    answers = np.zeros((heads, len(targets)))
    inside = np.zeros((heads, len(targets)), dtype=bool)
    for head in range(heads):
        while len(set(targets[inside[head]].tolist())) < classes:
            inside[head] = False
            inside[head, generator.permutation(len(targets))[:rows]] = True
        weight, bias = train(embeddings[inside[head]], targets[inside[head]])
        answers[head] = confidences(embeddings, targets, weight, bias)
    return answers, inside


def attack_heads(
    answers: _Array, inside: NDArray[np.bool_], attacked: int | None = None
) -> Membership:
    """Attack each head, or the first so many, by all the others.

    Args:
        answers: [heads, pool].
        inside: [heads, pool].
        attacked: how many; all, unless given.
    """
    heads = len(answers)
    attacked = heads if attacked is None else attacked
    ratios = np.zeros((attacked, answers.shape[1]))
    known = np.zeros(ratios.shape, dtype=bool)
    for head in range(attacked):
        others = np.arange(heads) != head
        mine, members = answers[others], inside[others]  # [heads - 1, pool]
        counts = members.sum(axis=0), (~members).sum(axis=0)  # [pool] each
        known[head] = (counts[0] >= 2) & (counts[1] >= 2)
        means = [
            (mine * chosen).sum(axis=0) / np.maximum(count, 1)
            for chosen, count in zip((members, ~members), counts, strict=True)
        ]
        # Few shadows tell little of one row's spread, so that all rows share one.
        centred = np.where(members, mine - means[0], mine - means[1])  # [heads - 1, pool]
        freedom = max(1, centred.size - 2 * centred.shape[1])
        variance = max(float((centred**2).sum()) / freedom, 1e-12)
        # Means of few heads are uncertain themselves.
        spread = [variance * (1 + 1 / np.maximum(count, 1)) for count in counts]
        log_in, log_out = (
            -((answers[head] - mean) ** 2) / (2 * width) - np.log(width) / 2
            for mean, width in zip(means, spread, strict=True)
        )
        ratios[head] = log_in - log_out
    members = inside[:attacked]
    return Membership.of_ratios(ratios[members & known], ratios[~members & known])


def attack_training(
    train: Training,
    name: str,
    embeddings: _Array,
    targets: _Targets,
    *,
    rows: int,
    heads: int,
    classes: int,
    budget: PrivacyBudget | None,
    visible: bool,
) -> list[AttackResult]:
    """Results of the attack on heads of so many rows.

    Args:
        train: what makes a head.
        name: what to call it.
        embeddings: [pool, d].
        targets: [pool].
        rows: rows that a head is trained on.
        heads: heads that are trained and attacked.
        classes: C.
        budget: what `train` keeps, if it keeps one.
        visible: members should be plain to see.
    """
    answers, inside = train_shadows(
        train, embeddings, targets, rows=rows, heads=heads, classes=classes, seed=rows
    )
    enough = min(heads, math.ceil(JUDGED_MEMBERS / rows))
    judged, everything = attack_heads(answers, inside, enough), attack_heads(answers, inside)

    def result(found: Membership, metric: str, value: float, chance: float) -> AttackResult:
        return AttackResult(
            attack="membership",
            system="plaintext" if budget is None else "veilhead",
            target=f"{name}, n={rows}, {heads} heads",
            metric=metric,
            value=value,
            samples=found.members + found.others,
            chance=chance,
        )

    rate = result(judged, "true positives at 0.1 %", judged.true_positives, FALSE_POSITIVES)
    if budget is not None and budget.epsilon <= WITHIN_NOISE_EPSILON:
        rate = contains_chance(rate, judged.interval)
    elif budget is not None:
        rate = not_above(rate, judged.interval, largest_rate(budget.mu))
    elif visible:
        rate = above(rate, 5 * FALSE_POSITIVES)
    results = [result(everything, "AUC", everything.auc, 0.5), rate]
    if enough < heads:
        low, high = everything.interval
        metric = f"all heads: true positives at 0.1 % (95 %: {100 * low:.2f} to {100 * high:.2f} %)"
        results.append(result(everything, metric, everything.true_positives, FALSE_POSITIVES))
    return results


def largest_rate(mu: float) -> float:
    """What no attack's true-positive rate exceeds at `FALSE_POSITIVES`, by the guarantee."""
    from scipy.stats import norm

    return float(norm.cdf(norm.ppf(FALSE_POSITIVES) + mu))


def private_training(classes: int, budget: PrivacyBudget, seed: int) -> Training:
    """Private training whose noise is drawn fast, for the many shadow heads."""
    generator = np.random.default_rng(seed)

    def noise(scale: float, count: int) -> NDArray[np.int64]:
        return np.rint(generator.normal(scale=scale, size=count)).astype(np.int64)

    def train(embeddings: _Array, targets: _Targets) -> tuple[_Array, _Array]:
        fit = fit_private_head(embeddings, targets, classes, budget, insecure_noise=noise)
        return fit.weight, fit.bias

    return train


def run(*, short: bool) -> list[AttackResult]:
    """Heads of icd10-chapters, of 200 and 10,000 rows, with and without differential privacy."""
    data = embedded("icd10-chapters")
    embeddings, targets, _ = data.pool
    results: list[AttackResult] = []
    for rows, heads in ((200, 16 if short else 128), (10_000, 16)):
        if short and rows > 200:
            continue
        if rows == 200:
            # Few rows cannot hold 22 classes: the four chapters with the most.
            chosen, classes = _largest(targets, 4), 4
            pool = np.random.default_rng(0).permutation(np.flatnonzero(chosen >= 0))[: 2 * rows]
            x, y = embeddings[pool], chosen[pool].astype(np.intp)
        else:
            x, y, classes = embeddings, targets, data.classes

        def plainly(
            rows_in: _Array, targets_in: _Targets, classes: int = classes
        ) -> tuple[_Array, _Array]:
            return fit_head(rows_in, targets_in, classes)

        results += attack_training(
            plainly, "without privacy", x, y,
            rows=rows, heads=heads, classes=classes, budget=None, visible=rows == 200,
        )  # fmt: skip
        for epsilon in (4.0, 2.0, 1.0):
            budget = PrivacyBudget(epsilon)
            try:
                budget.check_rows(rows, classes)
            except PrivacyError:
                continue
            results += attack_training(
                private_training(classes, budget, seed=rows), f"epsilon {epsilon:g}", x, y,
                rows=rows, heads=heads, classes=classes, budget=budget, visible=False,
            )  # fmt: skip
    return results


def _largest(targets: _Targets, count: int) -> _Targets:
    """The classes with the most rows as 0 ... count - 1, and -1 for all others: [rows]."""
    order = np.bincount(targets).argsort(kind="stable")[::-1][:count]
    places = np.full(int(targets.max()) + 1, -1)
    places[order] = np.arange(count)
    return places[targets].astype(np.intp)


def _auc(positive: _Array, negative: _Array) -> float:
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([positive, negative]))[: len(positive)]
    return float((ranks.mean() - (len(positive) + 1) / 2) / len(negative))
