"""What a token head that was trained privately still finds: values in generated records.

Heads are trained on one part of the generator's sentences and judged by other records twice: by
records of the same sentences, and by records of sentences that no head has seen. No value of a test
record stands in any record that was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from veilhead_benchmarks.attacks.dp_audit import no_noise
from veilhead_benchmarks.console import wide_console
from veilhead_benchmarks.deidentify_records import records
from veilhead_models.backbone import Backbone, minilm, token_backbone
from veilhead_models.entity_report import EntityReport
from veilhead_models.privacy import DEFAULT_DELTA, PrivacyBudget
from veilhead_models.records import Entity, Record
from veilhead_models.tagging import calibrated_scale, embed_records, fit_tagger

#: Seeds of the records that are trained on, and of each kind of those that are judged by.
_TRAIN_SEED: Final = 20261201
_TEST_SEEDS: Final = {"same sentences": 20261202, "other sentences": 20261203}

_EPSILONS: Final = (4.0, 1.0)


@dataclass(frozen=True)
class Measured:
    """What one head found.

    Attributes:
        head: how it was trained.
        run: the number of the run, from 1.
        test: the records it is judged by.
        report: what it found of them.
    """

    head: str
    run: int
    test: str
    report: EntityReport


def tagged_records(
    count: int, seed: int, *, unseen: bool | None = None, kinds: Sequence[str] | None = None
) -> list[Record]:
    """Generated records as training takes them."""
    return [
        Record(
            record.text,
            tuple(Entity(truth.start, truth.end, truth.kind) for truth in record.truths),
        )
        for record in records(count, seed, unseen=unseen, kinds=kinds)
    ]


def with_new_values(found: Iterable[Record], trained_on: Iterable[Record]) -> list[Record]:
    """Of records, those of which no value stands in a record that was trained on."""
    known = {value for record in trained_on for value in _values(record)}
    return [record for record in found if known.isdisjoint(_values(record))]


def _values(record: Record) -> list[str]:
    return [record.text[one.start : one.end].casefold() for one in record.entities]


def measure_tags(
    train: int, test: int, *, runs: int = 3, kinds: Sequence[str] | None = None
) -> list[Measured]:
    """Train heads on so many records, privately and not, and judge each by so many others."""
    trained_on = tagged_records(train, _TRAIN_SEED, unseen=False, kinds=kinds)
    backbone = Backbone.load(*token_backbone(*minilm()))
    scale = calibrated_scale(backbone).scale
    embedded = embed_records(trained_on, backbone, scale)
    labels = sorted({entity.label for record in trained_on for entity in record.entities})
    tests = {
        name: embed_records(
            with_new_values(
                tagged_records(test, seed, unseen=name == "other sentences", kinds=kinds),
                trained_on,
            ),
            backbone,
            scale,
        )
        for name, seed in _TEST_SEEDS.items()
    }
    results: list[Measured] = []

    def judge(name: str, run: int, budget: PrivacyBudget | None, *, noise: bool = True) -> None:
        head = fit_tagger(embedded, labels, budget, insecure_noise=None if noise else no_noise)
        for of_test, found in tests.items():
            report = head.report(found, labels, train_records=train)
            results.append(Measured(name, run, of_test, report))

    judge("usual", 1, None)
    for epsilon in _EPSILONS:
        budget = PrivacyBudget(epsilon, DEFAULT_DELTA)
        judge(f"without noise, as for epsilon {epsilon:g}", 1, budget, noise=False)
        for run in range(1, runs + 1):
            judge(f"epsilon {epsilon:g}", run, budget)
    return results


def run_pii_tags(*, train: int, test: int, runs: int, out: Path) -> dict[str, Any]:
    """Measure, print tables, write a JSON file and return what is in it."""
    measured = measure_tags(train, test, runs=runs)
    report: dict[str, Any] = {
        "train_records": train,
        "test_records": test,
        "delta": DEFAULT_DELTA,
        "seeds": {"train": _TRAIN_SEED, **_TEST_SEEDS},
        "results": [asdict(one) for one in measured],
    }
    console = wide_console()
    columns = ("head", "run", "test", "precision", "recall", "F1", "macro F1", "overlap F1")
    table = Table(*columns, box=None)
    for one in measured:
        found = one.report
        scores = (*asdict(found.micro).values(), found.macro.f1, found.micro_relaxed.f1)
        table.add_row(one.head, str(one.run), one.test, *(f"{score:.3f}" for score in scores))
    console.print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return report
