"""Every fault under load, in its short form: no answer is wrong, none is lost."""

from __future__ import annotations

import pytest

from veilhead_benchmarks.chaos import FAULTS, run_chaos
from veilhead_benchmarks.chaos_load import Outcome


@pytest.mark.slow
def test_no_fault_makes_an_answer_wrong_or_lost():
    outcomes = run_chaos(seconds=2.0)
    assert len(outcomes) == len(FAULTS) == 15
    for outcome in outcomes:
        assert outcome.passed, outcome
        assert (outcome.wrong, outcome.lost) == (0, 0)
        assert outcome.right > 0


def outcome(**fields):
    made = Outcome("fault", may_fail=False)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_a_run_fails_when_any_promise_is_broken():
    assert outcome(calls=3, right=3).passed
    assert not outcome(calls=3, right=2).passed  # one is lost
    assert not outcome(calls=3, right=2, wrong=1).passed
    assert not outcome(calls=0).passed  # nothing was shown
    failed = outcome(calls=3, right=2)
    failed.errors["transport"] = 1
    assert not failed.passed
    failed.may_fail = True
    assert failed.passed
    failed.expect(False, "a promise")
    assert not failed.passed
