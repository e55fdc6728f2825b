"""What a comparison calls a regression."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from veilhead_benchmarks.cli import app
from veilhead_benchmarks.compare import compare
from veilhead_benchmarks.rows import Results, Row

ROW = Row(
    "single", "veilhead", "standard", 384, 77, 1,
    server_ms=4.0, encrypt_ms=1.0, bytes_up=13764, max_error=5e-4,
)  # fmt: skip
LOAD = {"load": "closed", "classes": 22, "workers": 1, "texts_per_second": 400.0}


def run(*rows, load=LOAD, **environment):
    return Results(environment, rows, {"throughput": [load]})


@pytest.mark.parametrize(
    ("field", "value"),
    [("server_ms", 5.2), ("encrypt_ms", 1.3), ("bytes_up", 14000), ("max_error", 1.1e-3)],
)
def test_a_figure_that_became_worse_is_a_regression(field, value):
    found = compare(run(ROW), run(replace(ROW, **{field: value})))
    (regression,) = found.regressions
    assert (regression.field, regression.new) == (field, value)
    assert regression.ratio == pytest.approx(value / getattr(ROW, field))
    assert "single, veilhead, standard, d=384, classes=77, batch=1" in regression.case


@pytest.mark.parametrize(
    ("field", "value"),
    [("server_ms", 4.9), ("server_ms", 0.5), ("bytes_up", 13764), ("max_error", 9e-4)],
)
def test_noise_and_progress_are_none(field, value):
    assert not compare(run(ROW), run(replace(ROW, **{field: value}))).regressions


def test_fewer_texts_a_second_are_a_regression():
    found = compare(run(ROW), run(ROW, load=LOAD | {"texts_per_second": 300.0}))
    (regression,) = found.regressions
    assert regression.field == "texts_per_second"
    assert regression.ratio == pytest.approx(4 / 3)
    assert not compare(run(ROW), run(ROW, load=LOAD | {"texts_per_second": 900.0})).regressions


def test_the_threshold_decides():
    slower = run(replace(ROW, server_ms=4.9))
    assert len(compare(run(ROW), slower, threshold=1.2).regressions) == 1
    with pytest.raises(ValueError, match="expected more than 1"):
        compare(run(ROW), slower, threshold=1.0)


def test_times_below_the_clock_are_not_compared():
    tiny = replace(ROW, system="plaintext", server_ms=0.002, encrypt_ms=None)
    assert not compare(run(tiny), run(replace(tiny, server_ms=0.01))).regressions


def test_cases_of_one_run_are_named_and_no_regressions():
    other = replace(ROW, classes=2, server_ms=100.0)
    found = compare(run(ROW), run(other))
    assert len(found.gone) == len(found.added) == 1
    assert "classes=77" in found.gone[0]
    assert not found.regressions


def test_other_machines_are_said():
    assert compare(run(ROW, cores=2), run(ROW, cores=8)).machines == "cores: 2 before, 8 now"
    assert compare(run(ROW, cores=2), run(ROW, cores=2)).machines == ""


def test_the_command_ends_with_one_when_anything_became_worse(tmp_path):
    old, new, broken = (tmp_path / name for name in ("old.json", "new.json", "broken.json"))
    run(ROW).save(old)
    run(replace(ROW, server_ms=9.0)).save(new)
    broken.write_text("{}")
    call = CliRunner().invoke
    worse = call(app, ["compare", str(old), str(new)])
    assert worse.exit_code == 1
    assert "2.25" in worse.output
    assert call(app, ["compare", str(old), str(new), "--threshold", "3"]).exit_code == 0
    assert call(app, ["compare", str(new), str(old)]).exit_code == 0
    assert call(app, ["compare", str(old), str(broken)]).exit_code == 2
    assert call(app, ["compare", str(old), str(new), "--threshold", "0.5"]).exit_code == 2
