"""What de-identification finds of generated values, and what it costs a classifier.

Detection is judged by generated records (`deidentify_records`): nobody's real values can be kept in
a repository. The cost is judged by real texts and a real head, as they are and with generated
values put in front of every text, since published texts hold few values of their own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from veilhead.deidentify import Deidentifier
from veilhead_benchmarks.console import wide_console
from veilhead_benchmarks.deidentify_records import near_misses, records
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import Backbone, minilm
from veilhead_models.datasets import Dataset, Split, load_dataset
from veilhead_models.training import train_head

_SEED: Final = 20261123


@dataclass(frozen=True)
class Detection:
    """What was found of one kind, or of all.

    Attributes:
        kind: the kind, or `all`.
        values: values in the records.
        recall: share of them that were replaced whole, under their own kind.
        replaced: share of them that were replaced whole, under whatever kind.
        findings: replaced places of this kind.
        precision: share of these that hold a value of this kind.
    """

    kind: str
    values: int
    recall: float
    replaced: float
    findings: int
    precision: float


@dataclass(frozen=True)
class Accuracy:
    """What a head scores on one form of the test texts.

    Attributes:
        texts: the form: `as published`, `with values`, each with and without de-identification.
        accuracy: share of texts whose highest logit is the right label.
        same_label: share of texts that keep the label of the form without de-identification.
        changed: share of texts that de-identification changes.
    """

    texts: str
    accuracy: float
    same_label: float
    changed: float


def measure_detection(count: int, *, seed: int = _SEED) -> list[Detection]:
    """Recall and precision on so many records, by kind and (last) of all kinds."""
    deidentify = Deidentifier()
    values: Counter[str] = Counter()
    right: Counter[str] = Counter()
    replaced: Counter[str] = Counter()
    findings: Counter[str] = Counter()
    precise: Counter[str] = Counter()
    for record in records(count, seed):
        spans = deidentify(record.text).spans
        for truth in record.truths:
            around = [span for span in spans if span.start <= truth.start and truth.end <= span.end]
            values[truth.kind] += 1
            replaced[truth.kind] += bool(around)
            right[truth.kind] += any(span.kind == truth.kind for span in around)
        for span in spans:
            findings[span.kind] += 1
            precise[span.kind] += any(
                truth.kind == span.kind and truth.start < span.end and span.start < truth.end
                for truth in record.truths
            )

    def share(part: int, whole: int) -> float:
        return part / whole if whole else 0.0

    def of(kind: str) -> Detection:
        return Detection(
            kind=kind,
            values=values[kind],
            recall=share(right[kind], values[kind]),
            replaced=share(replaced[kind], values[kind]),
            findings=findings[kind],
            precision=share(precise[kind], findings[kind]),
        )

    kinds = sorted(values)
    for counter in (values, right, replaced, findings, precise):
        counter["all"] = sum(counter.values())
    return [of(kind) for kind in [*kinds, "all"]]


def measure_near_misses(count: int, *, seed: int = _SEED) -> float:
    """Share of sentences in which something was found, though they only look like it."""
    deidentify = Deidentifier()
    return sum(bool(deidentify(text).spans) for text in near_misses(count, seed)) / count


def measure_accuracy(
    dataset: Dataset, backbone: Backbone, *, train_rows: int, test_rows: int, seed: int = _SEED
) -> list[Accuracy]:
    """What a head that was trained on texts as published scores on four forms of test texts."""
    chosen = replace(
        dataset, train=_some(dataset.train, train_rows), test=_some(dataset.test, test_rows)
    )
    trained = train_head(chosen, backbone)
    head = HeadArtifact.from_weights(
        trained.weight, trained.bias, dataset.labels, embedding_scale=trained.embedding_scale
    )
    deidentify = Deidentifier()
    plain = list(chosen.test.texts)
    with_values = [
        f"{record.text} {text}"
        for record, text in zip(records(len(plain), seed), plain, strict=True)
    ]
    results: list[Accuracy] = []
    for name, texts in (("as published", plain), ("with values", with_values)):
        without = [deidentify(text).text for text in texts]
        answers = [_labels(head, backbone, form) for form in (texts, without)]  # [rows] each
        changed = np.mean([before != after for before, after in zip(texts, without, strict=True)])
        for form, labels, share in (
            (name, answers[0], 0.0),
            (f"{name}, de-identified", answers[1], float(changed)),
        ):
            results.append(
                Accuracy(
                    texts=form,
                    accuracy=float((labels == chosen.test.targets).mean()),
                    same_label=float((labels == answers[0]).mean()),
                    changed=share,
                )
            )
    return results


def run_deidentify(
    *, count: int, dataset: str, train_rows: int, test_rows: int, out: Path
) -> dict[str, Any]:
    """Measure both, print tables, write a JSON file and return what is in it."""
    detection = measure_detection(count)
    false_alarms = measure_near_misses(count)
    directory, section = minilm()
    accuracy = measure_accuracy(
        load_dataset(dataset),
        Backbone.load(directory, section),
        train_rows=train_rows,
        test_rows=test_rows,
    )
    report: dict[str, Any] = {
        "seed": _SEED,
        "records": count,
        "phonenumbers": version("phonenumbers"),
        "detection": [asdict(item) for item in detection],
        "near_misses_replaced": false_alarms,
        "dataset": {"name": dataset, "train_rows": train_rows, "test_rows": test_rows},
        "accuracy": [asdict(item) for item in accuracy],
    }
    _show(detection, false_alarms, dataset, accuracy)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return report


def _show(
    detection: Sequence[Detection],
    false_alarms: float,
    dataset: str,
    accuracy: Sequence[Accuracy],
) -> None:
    console = wide_console()
    table = Table("kind", "values", "recall", "replaced", "findings", "precision", box=None)
    for found in detection:
        shares = (f"{value:.3f}" for value in (found.recall, found.replaced))
        table.add_row(
            found.kind, str(found.values), *shares, str(found.findings), f"{found.precision:.3f}"
        )
    console.print(table)
    console.print(f"near misses in which something was replaced: {false_alarms:.3f}\n")
    table = Table(f"{dataset} test texts", "accuracy", "same label", "changed", box=None)
    for row in accuracy:
        shares = (f"{value:.4f}" for value in (row.accuracy, row.same_label, row.changed))
        table.add_row(row.texts, *shares)
    console.print(table)


def _some(split: Split, rows: int) -> Split:
    """So many rows, evenly out of the whole split."""
    places = np.unique(np.linspace(0, len(split.texts) - 1, rows).round().astype(np.intp))
    return Split(tuple(split.texts[place] for place in places), split.targets[places])


def _labels(head: HeadArtifact, backbone: Backbone, texts: Sequence[str]) -> NDArray[np.intp]:
    """Numbers of the labels [len(texts)] that the head answers in plaintext."""
    answers: NDArray[np.intp] = head.logits(backbone.embed(list(texts))).argmax(axis=1)
    return answers
