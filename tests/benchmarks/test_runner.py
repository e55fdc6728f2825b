"""A run of everything that needs neither a data set nor an environment of its own, in small."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from veilhead_benchmarks import runner
from veilhead_benchmarks.cli import app
from veilhead_benchmarks.peers.concrete_ml import PeerUnavailableError
from veilhead_benchmarks.rows import Results
from veilhead_benchmarks.runner import FULL, QUICK, Plan, run_benchmarks
from veilhead_benchmarks.throughput import Loads
from veilhead_protocol.errors import DatasetError

TINY = Plan(
    calls=2,
    peer_calls=1,
    classes=(2,),
    large=(77,),
    sweep_dimensions=(64,),
    batches=((8, 2),),
    peer_batches=((4, 2),),
    end_to_end=(),
    loads=(Loads(2, closed_seconds=0.2, open_seconds=0.2, shares=(0.5,), two_workers=False),),
    memory=(("standard", 30, 10, 100),),
    fidelity=(),
    concrete_ml=True,
)
BOUND = 2**-10 + 2**-13


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "deep" / "latest.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "concrete_ml_python", _no_concrete_ml)
        patch.setattr(runner, "DIMENSIONS", 128)  # most of the time goes to TenSEAL's tensor
        run_benchmarks(path, TINY)
    return Results.load(path)  # which checks the form of every row


def _no_concrete_ml():
    raise PeerUnavailableError("there is no network here")


def test_every_system_answers_the_same_head_rightly(results):
    rows = {
        (row.subject, row.system, row.classes): row.max_error
        for row in results.rows
        if row.max_error is not None
    }
    assert rows["single", "veilhead", 2] < BOUND
    assert rows["single", "veilhead", 77] < BOUND
    assert rows["batch", "veilhead", 2] < BOUND
    for case in ("plaintext", "tenseal-mm", "tenseal-bsgs"):
        assert rows["single", case, 2] < 1e-3
    assert rows["batch", "tenseal-batched", 2] < 1e-3


def test_both_parameter_sets_are_measured(results):
    rows = results.find(subject="single", system="veilhead", classes=2)
    assert [row.parameters for row in rows] == ["standard", "compact"]


def test_bytes_are_those_of_the_messages(results):
    row = results.one(subject="single", system="veilhead", parameters="standard", classes=2)
    assert (row.bytes_keys, row.bytes_up) == (27240, 27336)
    assert row.bytes_down <= 13_000
    peer = results.one(system="tenseal-mm")
    assert peer.bytes_keys > 1000 * row.bytes_keys


def test_requests_of_several_texts_have_keys_of_their_own(results):
    row = results.one(subject="batch", system="veilhead")
    assert row.note == "1 of 8 texts (block)"
    assert row.bytes_keys == 27240
    assert row.bytes_up < 8 * 27336


def test_every_query_has_a_floor(results):
    floors = {
        (row.parameters, row.d, row.classes, row.batch): row
        for row in results.find(subject="floor")
    }
    rows = [
        row
        for row in results.rows
        if row.system == "veilhead" and row.subject in ("single", "batch")
    ]
    assert len(floors) == len(rows) == 5
    for row in rows:
        floor = floors[row.parameters, row.d, row.classes, row.batch]
        assert floor.server_ms > 0  # that it is below the row's is for an idle machine to show
        assert "encryptions of zero" in floor.note


def test_primitives_are_timed_for_both_sets(results):
    found = [row for row in results.rows if row.subject.startswith("primitives/")]
    assert {row.parameters for row in found} == {"standard", "compact"}
    assert {"primitives/encrypt zero", "primitives/product", "primitives/inverse transform"} <= {
        row.subject for row in found
    }
    assert all(row.server_ms > 0 for row in found)


def test_throughput_and_memory_have_lists_of_their_own(results):
    assert [(row["load"], row["workers"]) for row in results.extra["throughput"]] == [
        ("closed", 1),
        ("open", 1),
    ]
    what = {row["what"]: row for row in results.extra["memory"]}
    assert len(what) == 3
    for row in what.values():
        # A key that took a megabyte would be found out; small counts hide in what pages are free.
        assert row["bytes_each"] < 10 * row["expected_bytes"] + 20_000
        assert row["bound_bytes"] > 0
        assert row["bounded_by"]


def test_what_was_left_out_is_said(results):
    assert results.environment["left_out"] == ["concrete-ml: there is no network here"]
    assert not results.find(system="concrete-ml-glwe")


def test_a_data_set_that_cannot_be_fetched_ends_no_run(tmp_path, monkeypatch):
    def unreachable(name):
        raise DatasetError(f"{name} cannot be fetched")

    monkeypatch.setattr(runner, "load_dataset", unreachable)
    results = run_benchmarks(tmp_path / "none.json", QUICK, ["end-to-end"])
    assert results.rows == ()
    assert results.environment["left_out"] == ["end-to-end: cfpb cannot be fetched"]


def test_the_environment_is_described(results):
    assert results.environment["versions"]["tenseal"]
    assert results.environment["load_average_before"] >= 0
    assert set(results.environment["seconds"]) == {
        "primitives",
        "queries",
        "batches",
        "concrete-ml",
        "end-to-end",
        "throughput",
        "memory",
        "fidelity",
    }


def test_a_subject_can_be_chosen(tmp_path):
    results = run_benchmarks(tmp_path / "one.json", TINY, ["primitives"])
    assert {row.subject.partition("/")[0] for row in results.rows} == {"primitives"}
    call = CliRunner().invoke(app, ["run", "--only", "else", "--out", str(tmp_path / "none.json")])
    assert call.exit_code == 2
    assert "expected primitives, queries" in " ".join(call.output.split())


def test_the_plans_hold_what_the_project_promises():
    assert {2, 20, 77} <= set(QUICK.classes)
    assert {(64, 77), (2048, 77)} <= set(QUICK.batches)
    assert (2048, 20) in QUICK.peer_batches
    assert {(case.texts, case.classes) for case in QUICK.end_to_end} >= {
        (texts, classes) for texts in (1, 32) for classes in (8, 22, 77)
    }
    assert (2048, 8) in {(case.texts, case.classes) for case in FULL.end_to_end}
    assert {2, 22, 77, 1024} == {loads.classes for loads in QUICK.loads}
    assert (min(FULL.sweep_dimensions), max(FULL.sweep_dimensions)) == (64, 4096)
    assert {1024, 4096} <= set(QUICK.large)
    assert max(texts for texts, _ in FULL.batches) == 8192
    for plan in (QUICK, FULL):
        assert len(set(plan.batches)) == len(plan.batches)
        assert not set(plan.classes) & set(plan.large)
        assert 384 not in plan.sweep_dimensions
    assert FULL.concrete_ml
    assert not QUICK.concrete_ml
