"""Records for token heads: what test records share with those trained on, and an audit of a run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from veilhead_benchmarks.attacks.dp_audit import Canaries, audit_training, no_noise
from veilhead_benchmarks.cli import app
from veilhead_benchmarks.deidentify_records import KINDS, records
from veilhead_benchmarks.pii_tags import measure_tags, tagged_records, with_new_values
from veilhead_models.dp_records import fit_private_tagger
from veilhead_models.privacy import PrivacyBudget
from veilhead_models.records import Record, load_records


def frames_of(found: list[Record]) -> set[str]:
    """What stands around the values, without digits and names of people."""
    frames = set()
    for record in found:
        for one in record.entities:
            before = re.split(r"[.?!] ", record.text[: one.start])[-1]
            frames.add(re.sub(r"\d|[A-Z][a-z]+ [A-Z][a-z]+", "", before[-12:]))
    return {frame for frame in frames if len(frame) > 7}


def test_other_sentences_are_others() -> None:
    seen, unseen = (tagged_records(600, 1, unseen=which) for which in (False, True))
    assert {one.label for record in unseen for one in record.entities} == set(KINDS)
    assert frames_of(seen)
    assert frames_of(unseen)
    assert not frames_of(seen) & frames_of(unseen)
    assert not any("Chart no." in record.text for record in unseen)
    assert not any("SSN" in record.text and "open the account" in record.text for record in seen)
    both = " ".join(record.text for record in records(900, 1))
    assert all(word in both for word in ("Chart no.", "was used to open the account"))


def test_no_value_of_a_test_record_was_trained_on() -> None:
    train = tagged_records(2000, 1, unseen=False)
    found = tagged_records(300, 2, unseen=False)
    kept = with_new_values(found, train)
    assert 200 < len(kept) < 300
    known = {
        record.text[one.start : one.end].lower() for record in train for one in record.entities
    }
    assert not any(
        record.text[one.start : one.end].lower() in known
        for record in kept
        for one in record.entities
    )


def test_the_command_writes_what_training_reads(tmp_path: Path) -> None:
    file = tmp_path / "pii.jsonl"
    done = CliRunner().invoke(app, ["records", str(file), "--count", "60", "--seed", "3"])
    assert done.exit_code == 0, done.output
    dataset = load_records(file)
    assert len(dataset.train) == 48
    assert set(dataset.labels) == set(KINDS)
    assert {*dataset.train, *dataset.test} == set(tagged_records(60, 3))


def test_noise_costs_entities_and_every_head_is_judged_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path))
    measured = measure_tags(190, 12, runs=1, kinds=("EMAIL", "IP"))
    found = {(one.head, one.test): one.report.micro.f1 for one in measured}
    assert len(found) == 10
    assert found["usual", "same sentences"] > 0.4
    assert found["usual", "same sentences"] > found["epsilon 1", "same sentences"]


def test_an_audit_passes_an_honest_run_on_records_and_catches_one_without_noise() -> None:
    """Canaries are records: the noise that hides a row would be no use if it did not hide them."""
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(300, 96))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    targets = generator.integers(0, 4, 300).astype(np.intp)
    common = embeddings[0]
    budget = PrivacyBudget(1.0)

    def fit(rows: np.ndarray, classes: np.ndarray, quiet: bool) -> np.ndarray:
        # Each with a token that all of them share.
        made = [
            (np.stack([row, common]), np.array([number, 0], dtype=np.intp))
            for row, number in zip(rows, classes, strict=True)
        ]
        noise = no_noise if quiet else None
        return fit_private_tagger(made, 4, budget, insecure_noise=noise).weight

    def audit(quiet: bool) -> float:
        return audit_training(
            lambda rows, classes: fit(rows, classes, quiet),
            lambda rows, classes: fit(rows, classes, True),
            embeddings,
            targets,
            Canaries.made(320, 96, 4, seed=1),
            delta=budget.delta,
            seed=2,
        ).epsilon

    assert audit(quiet=False) <= 1.0
    assert audit(quiet=True) > 2.5
