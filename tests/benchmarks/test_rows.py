"""The file of results is what the documents say, and nothing else passes for one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from veilhead_benchmarks.rows import FIELDS, SYSTEMS, Results, ResultsError, Row, added, timed

ROW = Row("single", "veilhead", "standard", 384, 2, 1, server_ms=0.5, bytes_up=10, note="a note")


def document(**changes):
    row = json.loads(Results({}, (ROW,), {}).to_json())["rows"][0]
    return {"environment": {"cores": 2}, "rows": [row | changes]}


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_fields_and_systems_are_the_promised_ones():
    assert FIELDS == (
        "subject", "system", "parameters", "d", "classes", "batch", "server_ms", "encrypt_ms",
        "decrypt_ms", "total_ms", "bytes_keys", "bytes_up", "bytes_down", "max_error", "note",
    )  # fmt: skip
    assert SYSTEMS == (
        "veilhead", "plaintext", "tenseal-mm", "tenseal-batched", "tenseal-bsgs",
        "concrete-ml-logreg", "concrete-ml-glwe",
    )  # fmt: skip


def test_results_survive_their_file(tmp_path):
    results = Results({"cores": 2}, (ROW, replace(ROW, classes=20)), {"memory": [{"what": "key"}]})
    results.save(tmp_path / "deep" / "results.json")
    assert Results.load(tmp_path / "deep" / "results.json") == results
    written = json.loads((tmp_path / "deep" / "results.json").read_text())
    assert list(written) == ["environment", "rows", "memory"]
    assert list(written["rows"][0]) == list(FIELDS)
    assert written["rows"][0]["decrypt_ms"] is None


@pytest.mark.parametrize(
    "changes",
    [
        {"subject": None},
        {"note": 1},
        {"system": "other"},
        {"d": 1.5},
        {"classes": True},
        {"batch": -1},
        {"bytes_up": "10"},
        {"server_ms": "fast"},
        {"total_ms": -1.0},
        {"max_error": float("nan")},
        {"extra": 1},
    ],
)
def test_a_row_that_is_none_is_refused(tmp_path, changes):
    with pytest.raises(ResultsError, match="row 0"):
        Results.load(write(tmp_path / "results.json", document(**changes)))


def test_a_row_without_a_field_is_refused(tmp_path):
    content = document()
    del content["rows"][0]["note"]
    with pytest.raises(ResultsError, match="expected exactly the fields subject, system"):
        Results.load(write(tmp_path / "results.json", content))


def test_a_case_occurs_once(tmp_path):
    content = document()
    content["rows"] *= 2
    with pytest.raises(ResultsError, match="occurs twice"):
        Results.load(write(tmp_path / "results.json", content))


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"rows": []},
        {"environment": {}},
        {"environment": [], "rows": []},
        {"environment": {}, "rows": {}},
        {"environment": {}, "rows": [], "memory": {}},
        {"environment": {}, "rows": [], "memory": [1]},
    ],
)
def test_a_file_that_holds_no_results_is_refused(tmp_path, content):
    with pytest.raises(ResultsError):
        Results.load(write(tmp_path / "results.json", content))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ResultsError, match=r"none\.json holds no results"):
        Results.load(tmp_path / "none.json")


def test_rows_are_found_by_their_fields():
    other = replace(ROW, classes=20)
    results = Results({}, (ROW, other), {})
    assert results.find(system="veilhead") == [ROW, other]
    assert results.one(classes=20) == other
    assert results.one(classes=77) is None


def test_the_median_is_taken_after_the_warm_up():
    calls = []
    milliseconds, value = timed(lambda: calls.append(0) or len(calls), 3, warm_up=2)
    assert value == 5
    assert 0 <= milliseconds < 100


def test_a_sum_of_nothing_is_nothing():
    assert added(None, 1.0, 2.0) == 3.0
    assert added(None, None) is None
