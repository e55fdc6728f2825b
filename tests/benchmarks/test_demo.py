"""The demo's report, from measurements that are made up; `make demo` makes real ones."""

from __future__ import annotations

import numpy as np
import pytest

from veilhead import QueryTrace
from veilhead_benchmarks.demo import Measured, summarise

TRACE = QueryTrace(0.001, 0.004, 0.003, 0.0005, 13672, 13764, 33523)
BOUND = 0.001


def measured(encrypted, plaintext, truth=0):
    return Measured(
        text="acute pain",
        truth=truth,
        encrypted=np.array(encrypted),
        plaintext=np.array(plaintext),
        embed_seconds=0.02,
        trace=TRACE,
    )


def test_the_report_has_the_documented_form():
    rows = [measured([2.0, 1.0], [2.0005, 1.0]), measured([1.0, 3.0], [1.0, 3.0])]
    assert summarise(rows, BOUND) == {
        "texts": 2,
        "accuracy": {"plaintext": 0.5, "encrypted": 0.5},
        "labels_agree": True,
        "max_logit_error": pytest.approx(0.0005),
        "milliseconds": {
            "embed": 20.0,
            "encrypt": 1.0,
            "round_trip": 4.0,
            "evaluate": 3.0,
            "decrypt": 0.5,
        },
        "bytes": {"key": 13672, "query": 13764, "reply": 33523},
    }


def test_labels_may_differ_only_where_the_margin_is_small():
    near = measured([1.0, 1.0005], [1.0009, 1.0])
    assert summarise([near], BOUND)["labels_agree"]
    far = measured([1.0, 1.0005], [1.0021, 1.0])
    assert not summarise([far], BOUND)["labels_agree"]


def test_an_error_beyond_the_bound_is_reported():
    assert summarise([measured([2.0, 1.0], [2.5, 1.0])], BOUND)["max_logit_error"] == 0.5
