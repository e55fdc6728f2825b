"""The runner's rows, on the smallest case."""

from __future__ import annotations

import json

import pytest

from veilhead_benchmarks import runner, throughput

FIELDS = [
    "subject",
    "system",
    "parameters",
    "d",
    "classes",
    "batch",
    "server_ms",
    "encrypt_ms",
    "decrypt_ms",
    "total_ms",
    "bytes_keys",
    "bytes_up",
    "bytes_down",
    "max_error",
    "note",
]


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "deep" / "latest.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "CLASSES", (2,))
        patch.setattr(runner, "_CALLS", 3)
        patch.setattr(runner, "_MM_CALLS", 1)
        patch.setattr(throughput, "_CLOSED_SECONDS", 0.3)
        patch.setattr(throughput, "_OPEN_SECONDS", 0.3)
        runner.run_benchmarks(path)
    return json.loads(path.read_text())


def test_rows_have_the_documented_fields(document):
    assert all(list(row) == FIELDS for row in document["rows"])
    assert [row["system"] for row in document["rows"]] == [
        "plaintext",
        "veilhead",
        "veilhead",
        "tenseal-mm",
    ]
    assert document["environment"]["versions"]["tenseal"]
    assert document["environment"]["load_average_before"] >= 0


def test_every_system_answers_the_same_head_rightly(document):
    errors = {row["system"]: row["max_error"] for row in document["rows"]}
    assert errors["veilhead"] < 2**-10 + 2**-13
    assert errors["tenseal-mm"] < 1e-3


def test_bytes_are_those_of_the_messages(document):
    compact = document["rows"][1]
    assert (compact["bytes_keys"], compact["bytes_up"]) == (13672, 13764)
    assert compact["bytes_down"] <= 7400
    peer = document["rows"][3]
    assert peer["bytes_keys"] > 1000 * compact["bytes_keys"]


def test_the_throughput_has_a_list_of_its_own(document):
    loads = [(row["load"], row["classes"]) for row in document["throughput"]]
    assert loads == [("closed", 2), ("open", 2), ("open", 2)]
