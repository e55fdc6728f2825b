"""Copying a head from its answers, over the number of queries.

A linear head is d + 1 unknowns for each class, and whoever gets logits gets one equation for each
with every answer. Nothing that returns logits can prevent that. What is measured is that our
interface gives no more than one that returns plaintext logits, what less informative interfaces
give (scores, labels), and how far a budget of queries lets a thief come.

    basis        the unit vectors and zero: every answer reads a column of the head
    texts        embeddings of ordinary texts, solved by least squares
    log-ratio    the same, of an interface that returns probabilities: logits up to a constant
    label-only   the same, of one that returns labels: a head is trained on them

A naive service on TenSEAL returns logits too: what it is asked costs a thief as much. The budget is
that of a real service, over its HTTP interface, whose thief asks on until it is refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from veilhead import BatchError, BudgetExhaustedError, Client
from veilhead.local import InProcessTransport
from veilhead_benchmarks.attacks.data import embedded
from veilhead_benchmarks.attacks.pair import Pair, random_head, relative_error
from veilhead_benchmarks.attacks.results import AttackResult, above, at_most
from veilhead_benchmarks.heads import Head
from veilhead_benchmarks.peers.tenseal_batched import TensealBatchedExchange
from veilhead_benchmarks.processes import add_tenants
from veilhead_models.artifact import HeadArtifact
from veilhead_protocol.policy import BudgetClause, PolicySection
from veilhead_service.app import create_app
from veilhead_service.model_store import SingleModel
from veilhead_service.settings import Settings

_Array = NDArray[np.float64]

#: What an interface answers to embeddings [n, d]: logits or log-probabilities, [n, C].
Interface = Callable[[_Array], _Array]

#: What is added to the squared singular values of the equations: it holds back the rounding of the
#: answers, 2^-12, and no more.
_RIDGE: Final = 1e-6

#: How much better than on plaintext logits the attacker may do on ours: nothing but luck.
_LUCK: Final = 0.01


#: Texts that the service of the full form answers in a month.
BUDGET: Final = 200


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
    basis_rows = np.vstack([np.zeros(dimensions), np.eye(dimensions)])
    basis = pair.logits(basis_rows)
    naive = TensealBatchedExchange(Head(weight, artifact.bias))
    asked = np.vstack([basis_rows, texts[:most]])
    naive_answers = naive.decrypt(naive.evaluate(naive.encrypt(asked)))
    naive_basis, naive_answers = np.split(naive_answers, [len(basis_rows)])

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
            curve=attack,
            at=count,
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
        for attack, stolen in (
            ("basis", by_basis(lambda rows: naive_basis[: len(rows)], dimensions, columns)),
            ("texts", by_texts(lambda rows: naive_answers[: len(rows)], rows)),
        ):
            found += [
                result(
                    attack,
                    "tenseal-batched",
                    count,
                    _AGREEMENT,
                    float(np.mean(stolen.labels(held_out) == victim)),
                ),
                result(
                    attack, "tenseal-batched", count, _ERROR, relative_error(stolen.weight, weight)
                ),
            ]
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


def within_a_budget(
    artifact: HeadArtifact, texts: _Array, held_out: _Array, units: int
) -> list[AttackResult]:
    """What a thief gets of a service whose policy has a budget: it asks text by text.

    Args:
        artifact: the head to copy.
        texts: embeddings [n, d] that it asks about, n above the budget.
        held_out: embeddings that agreement is measured on.
        units: the budget, in texts.
    """
    policy = PolicySection(query_budget=BudgetClause(units=units, period="month"))
    answers: list[_Array] = []
    with tempfile.TemporaryDirectory() as work:
        directory, state = Path(work) / "artefact", Path(work) / "state"
        replace(artifact, name="attacked", policy=policy).save(directory)
        settings = Settings(workers=1, state_directory=state, access_log="off", tracing=False)
        (api_key,) = add_tenants(state, 1)
        app = create_app(settings, models=SingleModel(directory))
        with Client(
            "http://127.0.0.1", "attacked", api_key=api_key, transport=InProcessTransport(app)
        ) as client:
            try:
                for row in texts:
                    answers.append(client.logits(row[np.newaxis])[0])
            except BatchError as error:
                if not isinstance(error.errors[0], BudgetExhaustedError):
                    raise
    copy = by_texts(lambda _: np.array(answers), texts[: len(answers)])
    plain = by_texts(artifact.logits, texts[:units])
    victim = artifact.logits(held_out).argmax(axis=1)

    def result(metric: str, value: float, samples: int) -> AttackResult:
        target = f"texts, asked of a service with a budget of {units}"
        return AttackResult(
            "extraction", "veilhead", target, metric, value, samples, curve="budget", at=units
        )

    agreed = float(np.mean(copy.labels(held_out) == victim))
    allowed = float(np.mean(plain.labels(held_out) == victim))
    return [
        at_most(result("answers before it refused", len(answers), len(texts)), units),
        at_most(result(_WITH_BUDGET, agreed, len(held_out)), allowed + _LUCK),
    ]


_AGREEMENT: Final = "share of held-out texts labelled alike"
_WITH_BUDGET: Final = "share, with a budget, of held-out texts labelled alike"
_ERROR: Final = "relative error of the weights"


def run(*, short: bool) -> list[AttackResult]:
    """A head trained on icd10-chapters and its texts; in the short form, random ones."""
    if short:
        rows = np.random.default_rng(3).normal(size=(600, 24))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        head = random_head(4, 24)
        # Not as many as unknowns (25): there the noise of an answer decides what is found.
        results = curves(head, rows[:100], rows[100:], (5, 20, 100))
        results += within_a_budget(head, rows[:30], rows[100:], 10)
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
    results += within_a_budget(artifact, texts[: BUDGET + 50], held_out, BUDGET)
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
