"""The soak and the fairness table in their short forms, and that they notice an unfair service."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from veilhead_benchmarks.fairness import run_fairness
from veilhead_benchmarks.recording import Side
from veilhead_benchmarks.soak import Phase, SoakReport, run_soak, slope_percent

#: Makes one line of all tenants: who comes first is served first, and takes every place.
UNFAIR = """\
from veilhead_service.line import FairLine
make, join = FairLine.__init__, FairLine.join
FairLine.__init__ = lambda self, capacity, *, shared: make(self, capacity, shared=False)
FairLine.join = lambda self, tenant, cost: join(self, "everybody", 0)
"""

#: A light tenant's answers over the abusive one's: about 1 in turns, its share of connections (0.05)
#: and what the line leaves of them in one queue.
BETWEEN = 0.35


def soak(environment=None):
    return run_soak(
        seconds=4.0,
        workers=1,
        tenants=3,
        clients=8,
        abuser_connections=160,
        environment=environment,
    )


def check_accounts(side):
    assert side.asked == side.answered + side.wrong + side.lost
    assert sum(side.in_time.values()) <= side.answered
    assert side.answered > 0
    assert side.checked > 0
    assert side.wrong == 0


@pytest.mark.slow
def test_light_tenants_are_answered_beside_an_abusive_one():
    report = soak()
    for side in (report.alone.light, report.beside.light):
        check_accounts(side)
        assert side.lost == 0
        assert set(side.in_time) == {"tenant-0", "tenant-1"}
        assert side.connections == 16
    abuser = report.beside.abuser
    check_accounts(abuser)
    assert set(abuser.in_time) == {"tenant-2"}
    assert abuser.connections == 160
    assert abuser.refused["queue-full"] > 0
    assert abuser.broken == 0
    assert report.least_share > BETWEEN
    assert dict(report.promises())["open files are level"]
    assert report.alone.abuser is None


@pytest.mark.slow
def test_a_service_without_fair_shares_is_noticed(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(UNFAIR, "utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    report = soak({"PYTHONPATH": path})
    assert report.least_share < BETWEEN
    assert not report.passed


@pytest.mark.slow
def test_a_light_tenant_is_answered_beside_a_heavy_one():
    rows = run_fairness(
        seconds=1.0, workers=1, connections=(0, 32), settings={"waiting_per_worker": 16}
    )
    assert [(row.connections, row.polite) for row in rows] == [
        (0, None),
        (32, True),
        (32, False),
    ]
    for row in rows:
        assert row.passed
        check_accounts(row.light)
        assert row.light.lost == 0
        assert row.light.connections == 1
    alone, polite, impolite = rows
    assert alone.heavy is None
    for row in (polite, impolite):
        check_accounts(row.heavy)
        assert row.heavy.refused["queue-full"] > 0
    assert polite.heavy.lost == 0


def side(**fields):
    made = Side(
        connections=1,
        seconds=1.0,
        asked=10,
        answered=10,
        in_time={"tenant-0": 10},
        wrong=0,
        lost=0,
        refused={},
        broken=0,
        checked=1,
        p50_ms=1.0,
        p99_ms=2.0,
        generator_cores=0.1,
    )
    return replace(made, **fields)


def report(*, beside=None, light=None, abuser=None):
    phase = Phase(
        light=side(),
        abuser=None,
        livez_p50_ms=1.0,
        livez_p99_ms=1.0,
        memory_mb=200.0,
        memory_slope_percent=0.0,
        most_descriptors=30,
        descriptors=20,
        service_cores=0.1,
        worker_cores=1.0,
    )
    other = replace(
        phase, light=side(**(light or {})), abuser=side(refused={"queue-full": 1}, **(abuser or {}))
    )
    return SoakReport(1, 1, phase, replace(other, **(beside or {})))


@pytest.mark.parametrize(
    "broken",
    [
        {"light": {"wrong": 1}},
        {"abuser": {"wrong": 1}},
        {"light": {"lost": 1}},
        {"light": {"checked": 0}},
        {"light": {"p99_ms": 6.5}},
        {"light": {"p99_ms": None}},
        {"light": {"in_time": {"tenant-0": 4}}},
        {"beside": {"descriptors": 21}},
        {"beside": {"memory_slope_percent": 1.0}},
        {"beside": {"abuser": side()}},  # never refused
    ],
)
def test_a_soak_fails_when_any_promise_is_broken(broken):
    assert report().passed
    assert report(abuser={"lost": 5}).passed
    assert not report(**broken).passed


def test_memory_is_judged_after_the_warm_up_and_not_by_a_short_run():
    level = [(float(second), 100 if second < 50 else 200) for second in range(240)]
    assert slope_percent(level) == pytest.approx(0.0, abs=1e-6)
    rising = [(float(second), 10**9 + 10**5 * second) for second in range(240)]
    assert slope_percent(rising) == pytest.approx(6.0, rel=0.05)
    assert slope_percent(level[:100]) is None
