"""Copying a head from its answers, over the number of queries.

A linear head is d + 1 unknowns for each class, and whoever gets logits gets one equation for each
with every answer. Nothing that returns logits can prevent that. What is measured is that our
interface gives no more than one that returns plaintext logits, what less informative interfaces
give (scores, labels), and how far a budget of queries lets a thief come.

    basis        the unit vectors and zero: every answer reads a column of the head
    texts        embeddings of ordinary texts, solved by least squares
    log-ratio    the same, of an interface that returns probabilities: logits up to a constant
    label-only   the same, of one that returns labels: a head is trained on them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from veilhead_benchmarks.attacks.data import embedded
from veilhead_benchmarks.attacks.pair import Pair, random_head, relative_error
from veilhead_benchmarks.attacks.results import AttackResult, above, at_most
from veilhead_models.artifact import HeadArtifact

_Array = NDArray[np.float64]

#: What an interface answers to embeddings [n, d]: logits or log-probabilities, [n, C].
Interface = Callable[[_Array], _Array]

#: What is added to the squared singular values of the equations: it holds back the rounding of the
#: answers, 2^-12, and no more.
_RIDGE: Final = 1e-6

#: How much better than on plaintext logits the attacker may do on ours: nothing but luck.
_LUCK: Final = 0.01


@dataclass(frozen=True)
class Copy:
    """A copied head, as far as an attacker came: weight [C, d], bias [C]."""

    weight: _Array
    bias: _Array

    def labels(self, embeddings: _Array) -> NDArray[np.intp]:
        """Its answers to embeddings [n, d]."""
        answers: NDArray[np.intp] = (embeddings @ self.weight.T + self.bias).argmax(axis=1)
        return answers


def by_basis(ask: Interface, dimensions: int, queries: int) -> Copy:
    """The columns of so many unit vectors, after the bias; the others stay zero."""
    rows = np.vstack([np.zeros(dimensions), np.eye(dimensions)[: queries - 1]])
    answers = ask(rows)  # [n, C]
    weight = np.zeros((answers.shape[1], dimensions))
    weight[:, : len(answers) - 1] = (answers[1:] - answers[0]).T
    return Copy(weight, answers[0])


def by_texts(ask: Interface, embeddings: _Array) -> Copy:
    """The smallest head that gives the answers to embeddings [n, d]."""
    rows = np.column_stack([embeddings, np.ones(len(embeddings))])  # [n, d + 1]
    answers = ask(embeddings)  # [n, C]
    gram = rows @ rows.T + _RIDGE * np.eye(len(rows))
    found = rows.T @ np.linalg.solve(gram, answers)  # [d + 1, C]
    return Copy(found[:-1].T, found[-1])


def by_labels(labels: NDArray[np.intp], classes: int, embeddings: _Array) -> Copy:
    """A head trained on the labels [n] of embeddings [n, d]."""
    weight = np.zeros((classes, embeddings.shape[1]))
    bias = np.full(classes, -1e3)  # never seen
    seen = np.unique(labels)
    if len(seen) == 1:
        bias[seen] = 0
        return Copy(weight, bias)
    fitted = LogisticRegression(C=100.0, max_iter=500).fit(embeddings, labels)
    found, offset = fitted.coef_, fitted.intercept_
    if len(seen) == 2:  # one row stands for both
        found, offset = np.vstack([-found, found]) / 2, np.append(-offset, offset) / 2
    weight[seen], bias[seen] = found, offset
    return Copy(weight, bias)


def centred(copy: Copy) -> Copy:
    """The copy less the mean of its classes: what probabilities determine."""
    return Copy(copy.weight - copy.weight.mean(axis=0), copy.bias - copy.bias.mean())


def _fitted(found: _Array, wanted: _Array) -> _Array:
    """The weights times whatever brings them nearest to the wanted ones."""
    norm = float((found**2).sum())
    fitted: _Array = found * (float((found * wanted).sum()) / norm if norm else 0.0)
    return fitted


def _log_probabilities(logits: _Array) -> _Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    found: _Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def curves(
    artifact: HeadArtifact, texts: _Array, held_out: _Array, budgets: tuple[int, ...]
) -> list[AttackResult]:
    """Agreement and weight error over the number of queries, of every attack and interface.

    Args:
        artifact: the head to copy.
        texts: embeddings [n, d] that the attacker can ask about, n at least the largest budget.
        held_out: embeddings that agreement is measured on.
        budgets: numbers of queries.
    """
    pair = Pair.of(artifact)
    weight, dimensions = artifact.weight, artifact.weight.shape[1]
    victim = artifact.logits(held_out).argmax(axis=1)
    most = max(budgets)
    answers = pair.logits(texts[:most])  # asked once: an attacker with less has the first of them
    basis = pair.logits(np.vstack([np.zeros(dimensions), np.eye(dimensions)]))

    def plaintext(rows: _Array) -> _Array:
        return artifact.logits(rows)

    def probabilities(rows: _Array) -> _Array:
        return _log_probabilities(artifact.logits(rows))

    # Budgets charge one for each text of these requests: a budget cuts the curve at its number.
    def result(attack: str, system: str, count: int, metric: str, value: float) -> AttackResult:
        return AttackResult(
            attack="extraction",
            system=system,
            target=f"{attack}, {count} queries",
            metric=metric,
            value=value,
            samples=len(held_out) if metric == _AGREEMENT else weight.size,
        )

    def judged(attack: str, count: int, theirs: Copy, ours: Copy) -> list[AttackResult]:
        """The pair of one attack: ours gives the attacker no more than plaintext does."""
        agreed = [float(np.mean(copy.labels(held_out) == victim)) for copy in (theirs, ours)]
        errors = [
            # Labels tell nothing of the size of the weights.
            relative_error(_fitted(copy.weight, weight), weight)
            if attack == "label-only"
            else relative_error(copy.weight, weight)
            for copy in (theirs, ours)
        ]
        same = result(attack, "veilhead", count, _AGREEMENT, agreed[1])
        if agreed[0] + _LUCK < 1:  # else there is nothing that ours could give more of
            same = at_most(same, agreed[0] + _LUCK)
        return [
            result(attack, "plaintext", count, _AGREEMENT, agreed[0]),
            same,
            result(attack, "plaintext", count, _ERROR, errors[0]),
            above(result(attack, "veilhead", count, _ERROR, errors[1]), 0.95 * errors[0]),
        ]

    found = []
    for count in budgets:
        rows = texts[:count]
        columns = min(count, dimensions + 1)
        found += judged(
            "basis",
            count,
            by_basis(plaintext, dimensions, columns),
            by_basis(lambda rows: basis[: len(rows)], dimensions, columns),
        )
        found += judged(
            "texts",
            count,
            by_texts(plaintext, rows),
            by_texts(lambda rows: answers[: len(rows)], rows),
        )
        ratio = centred(by_texts(probabilities, rows))
        target = centred(Copy(weight, artifact.bias)).weight
        found += [
            result(
                "log-ratio",
                "plaintext",
                count,
                _AGREEMENT,
                float(np.mean(ratio.labels(held_out) == victim)),
            ),
            result("log-ratio", "plaintext", count, _ERROR, relative_error(ratio.weight, target)),
        ]
        labels = [part.argmax(axis=1) for part in (plaintext(rows), answers[:count])]
        theirs = ours = by_labels(labels[0], len(weight), rows)
        if not np.array_equal(*labels):
            ours = by_labels(labels[1], len(weight), rows)
        found += judged("label-only", count, theirs, ours)
    return found


_AGREEMENT: Final = "share of held-out texts labelled alike"
_ERROR: Final = "relative error of the weights"


def run(*, short: bool) -> list[AttackResult]:
    """A head trained on icd10-chapters and its texts; in the short form, random ones."""
    if short:
        rows = np.random.default_rng(3).normal(size=(600, 24))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        results = curves(random_head(4, 24), rows[:100], rows[100:], (5, 25, 100))
        return _with_controls(results, full=100)
    data = embedded("icd10-chapters")
    fitted = LogisticRegression(C=2.0, max_iter=2000).fit(data.train, data.dataset.train.targets)
    artifact = HeadArtifact.from_weights(
        fitted.coef_, fitted.intercept_, data.dataset.labels, name="attacked"
    )
    order = np.random.default_rng(3).permutation(len(data.test))
    held_out, texts = data.test[order[:1000]], data.train
    texts = texts[np.random.default_rng(4).permutation(len(texts))]
    results = curves(artifact, texts, held_out, (10, 50, 100, 200, 400, 800, 1600))
    return _with_controls(results, full=1600)


def _with_controls(results: list[AttackResult], full: int) -> list[AttackResult]:
    """The results, the attack on plaintext logits being expected to work at its largest."""
    return [
        above(result, 0.99)
        if result.system == "plaintext"
        and result.metric == _AGREEMENT
        and result.target in (f"basis, {full} queries", f"texts, {full} queries")
        else result
        for result in results
    ]
