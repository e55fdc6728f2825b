"""The runner of the attacks: what holds, what does not, and the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy.stats import binom
from typer.testing import CliRunner

from veilhead_benchmarks.attacks import runner
from veilhead_benchmarks.attacks.results import (
    AttackResult,
    above,
    at_chance,
    at_chance_count,
    at_most,
)
from veilhead_benchmarks.cli import app


def found(value: float) -> AttackResult:
    return AttackResult("made-up", "plaintext", "a target", "AUC", value, 100, chance=0.5)


def test_promises() -> None:
    assert above(found(0.9), 0.8).holds
    assert above(found(0.8), 0.8).holds is False
    assert at_most(found(0.8), 0.8).holds
    assert at_most(found(0.81), 0.8).holds is False
    assert at_chance(found(0.53), 0.01).holds
    assert at_chance(found(0.55), 0.01).holds is False
    assert at_chance(found(0.45), 0.01).holds is False


def test_few_hits_are_judged_as_counts() -> None:
    def hits(count: int) -> AttackResult:
        return AttackResult("a", "plaintext", "t", "top 1", count / 1000, 1000, chance=0.001)

    assert [at_chance_count(hits(count)).holds for count in (0, 1, 6, 8)] == [
        True,
        True,
        True,
        False,
    ]
    allowed = sum(binom.pmf(k, 1000, 0.001) for k in range(1000) if at_chance_count(hits(k)).holds)
    assert 1 - 1 / 15_000 < allowed < 1  # as rare as four deviations of a normal distribution


def test_a_figure_that_is_not_a_number_holds_no_promise() -> None:
    nan = found(float("nan"))
    assert above(nan, 0.0).holds is False
    assert at_most(nan, 1.0).holds is False
    assert at_chance(nan, 1.0).holds is False


@pytest.mark.parametrize("holds", [True, False])
def test_the_command_fails_when_a_promise_is_broken(
    holds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def run(*, short: bool) -> list[AttackResult]:
        asked.append(short)
        return [above(found(0.9), 0.8 if holds else 0.95)]

    monkeypatch.setattr(runner, "ATTACKS", {"made-up": run})
    out = tmp_path / "results" / "attacks.json"
    result = CliRunner().invoke(app, ["attack", "made-up", "--short", "--out", str(out)])
    assert result.exit_code == (0 if holds else 1)
    assert asked == [True]
    document = json.loads(out.read_text("utf-8"))
    (row,), (figure,) = document["rows"], document["attacks"]
    assert row["subject"] == "attack-made-up"
    assert row["system"] == "plaintext"
    assert row["server_ms"] is None
    assert figure["value"] == 0.9
    assert figure["holds"] is holds


def test_an_unknown_attack_is_refused() -> None:
    result = CliRunner().invoke(app, ["attack", "telepathy"])
    assert result.exit_code == 2
    assert "membership" in result.output
