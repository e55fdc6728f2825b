"""What attacks found, in the same file and the same report as the benchmarks."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from veilhead_benchmarks.attack_plots import attack_plots
from veilhead_benchmarks.attacks.results import AttackResult, above, at_most, write_results
from veilhead_benchmarks.cli import app
from veilhead_benchmarks.report import to_html
from veilhead_benchmarks.rows import Results, ResultsError, Row

AGREEMENT = "share of held-out texts labelled alike"


def made_up():
    """Something of every attack that has a plot."""
    found = [
        AttackResult(
            "extraction", system, f"{curve}, {at} queries", AGREEMENT, at / 400, 100,
            curve=curve, at=at,
        )
        for curve in ("basis", "texts", "log-ratio", "label-only")
        for system in ("plaintext", "veilhead")
        for at in (10, 100, 400)
    ]  # fmt: skip
    budget = "share, with a budget, of held-out texts labelled alike"
    found += [
        AttackResult("extraction", "veilhead", "a budget", budget, 0.5, 9, curve="budget", at=200)
    ]
    for target in ("embedding", "query bytes (standard)"):
        for metric, chance in (("decoder: mean AUC of words", 0.5), ("retrieval: top 1", 0.001)):
            found.append(AttackResult("inversion", "plaintext", target, metric, 0.6, 9, chance))
        found.append(
            AttackResult("attributes", "plaintext", target, "accuracy: sex <b>", 0.7, 9, 0.5)
        )
    for target, rate in (("without privacy, n=200", 0.1), ("epsilon 4, n=200", 0.001)):
        for metric, value, chance in (
            ("AUC", 0.6, 0.5),
            ("true positives at 0.1 %", rate, 0.001),
        ):
            found.append(AttackResult("membership", "plaintext", target, metric, value, 9, chance))
    for at in (1.0, 4.0):
        for curve, value in (("honest run", at / 2), ("noise silently off", 4.8)):
            result = AttackResult(
                "dp-audit", "veilhead", f"{curve}, claims {at:g}", "bound", value, 9,
                curve=curve, at=at,
            )  # fmt: skip
            found.append(at_most(result, at) if curve == "honest run" else above(result, at))
    found += [
        AttackResult(
            "adversarial-text", "plaintext", "head", f"accuracy with {at} words edited",
            0.8 - at / 10, 9, curve="head", at=at,
        )
        for at in (0, 1, 2)
    ]  # fmt: skip
    broken = AttackResult("traffic", "veilhead", "sizes", "lengths of queries", 2, 9)
    return [*found, at_most(broken, 1)]


@pytest.fixture
def file(tmp_path):
    out = tmp_path / "attacks.json"
    write_results(made_up(), out, {"extraction": 1.5})
    return out


def test_the_file_is_one_of_the_benchmarks(file):
    results = Results.load(file)
    assert len(results.rows) == len(results.extra["attacks"]) == len(made_up())
    assert results.environment["seconds"] == {"extraction": 1.5}
    assert results.environment["processor"]
    assert {row.system for row in results.rows} == {"plaintext", "veilhead"}


def test_every_attack_with_a_curve_is_drawn(file):
    plots = {plot.title: plot for plot in attack_plots(Results.load(file))}
    assert len(plots) == 6
    (axes,) = plots["Attack: copying a head"].figure.axes
    labels = axes.get_legend_handles_labels()[1]
    curves = ["basis", "texts", "log-ratio", "label-only"]
    assert labels == [*curves, "plaintext", "veilhead", "a budget of 200 texts"]
    drawn = [line.get_xydata().tolist() for line in axes.get_lines()]
    assert drawn.count([[10, 0.025], [100, 0.25], [400, 1.0]]) == 4 * 2
    assert [[200, 0.5]] in drawn  # where the thief was cut off
    (audit,) = plots["Audit of private training"].figure.axes
    assert sorted(bar.get_height() for bar in audit.patches) == [0.5, 2.0, 4.8, 4.8]


def test_the_report_says_what_does_not_hold_first(file):
    page = to_html(Results.load(file))
    assert "4 of 5 expectations hold" in page
    assert page.index("lengths of queries") < page.index("epsilon 4, n=200")
    assert "<td class=no>no</td>" in page
    assert "sex &lt;b&gt;" in page
    assert page.index("<img") < page.index("<table>")  # no claims of benchmarks before the plots


def test_runs_are_shown_together_and_never_twice(file, tmp_path):
    run = tmp_path / "latest.json"
    Results({"date": "2026-11-23"}, (Row("batch", "veilhead", "c", 384, 2, 8),), {}).save(run)
    done = CliRunner().invoke(app, ["report", str(run), str(file)])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "latest.html").read_text("utf-8")
    assert "Many texts at once" in page
    assert "Attack: copying a head" in page
    assert page.count("Measured on") == 2
    with pytest.raises(ResultsError, match="same subjects"):
        Results.joined([Results.load(file)] * 2)
    twice = CliRunner().invoke(app, ["report", str(file), str(file)])
    assert twice.exit_code == 2


def test_a_part_of_the_attacks_has_its_plots(file):
    document = json.loads(file.read_text("utf-8"))
    for entry in document["attacks"]:
        for plot in attack_plots(Results({}, (), {"attacks": [entry]})):
            assert plot.figure.axes
