"""The soak and the fairness table in their short forms, and that they notice an unfair service."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from veilhead.session import Session
from veilhead_benchmarks import fairness as fairness_module
from veilhead_benchmarks import soak as soak_module
from veilhead_benchmarks.cli import app
from veilhead_benchmarks.fairness import Row, run_fairness
from veilhead_benchmarks.processes import publish_random, unit_rows
from veilhead_benchmarks.recording import Exchange, Side, Voice
from veilhead_benchmarks.replay import Outcome, Recorded, Tally
from veilhead_benchmarks.soak import Phase, SoakReport, run_soak, slope_percent
from veilhead_protocol.wire import REPLY_HEADER_BYTES
from veilhead_service.encrypted_head import ClientKey, EncryptedHead

#: Makes one line of all tenants: who comes first is served first, and takes every place.
UNFAIR = """\
from veilhead_service.line import FairLine
make, join = FairLine.__init__, FairLine.join
FairLine.__init__ = lambda self, capacity, *, shared: make(self, capacity, shared=False)
FairLine.join = lambda self, tenant, cost: join(self, "everybody", 0)
"""

#: A light tenant's answers over the abusive one's: about 1 when tenants take turns; in one queue
#: its share of those who wait, 8 to about 50.
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


@pytest.mark.parametrize(("lost", "status"), [(0, 0), (1, 1)])
def test_the_commands_end_as_the_promises_say(tmp_path, monkeypatch, lost, status):
    monkeypatch.setattr(soak_module, "run_soak", lambda **_: report(light={"lost": lost}))
    rows = [Row(0, None, side(lost=lost), None), Row(8, False, side(), side(lost=5))]
    monkeypatch.setattr(fairness_module, "run_fairness", lambda **_: rows)
    out = tmp_path / "results" / "out.json"
    result = CliRunner().invoke(app, ["soak", "--out", str(out)])
    assert result.exit_code == status
    assert ("BROKEN" in result.output) == bool(lost)
    assert json.loads(out.read_text("utf-8"))["p99_ratio"] == 1.0
    result = CliRunner().invoke(app, ["fairness", "--out", str(out)])
    assert result.exit_code == status
    assert [row["light"]["lost"] for row in json.loads(out.read_text("utf-8"))] == [lost, 0]


def test_a_kept_reply_with_the_right_header_and_wrong_logits_is_wrong(tmp_path):
    artifact = publish_random(tmp_path / "store", tmp_path, "two", 2, 16)
    rows = unit_rows(1, 16, 1)
    session = Session(artifact.manifest)
    query = session.encrypt_batch(rows)
    key = ClientKey.from_message(query.key.message)
    good, bad = (
        EncryptedHead(artifact.manifest, artifact.weight, bias).evaluate(query.data, key)
        for bias in (artifact.bias, artifact.bias + 1)
    )
    assert good[:REPLY_HEADER_BYTES] == bad[:REPLY_HEADER_BYTES]
    recorded = Recorded(b"", good[:REPLY_HEADER_BYTES], len(good))
    exchange = Exchange(artifact, session, query, artifact.logits(rows), recorded)
    tally = Tally(asked=3, answered=3, in_time=3, latencies=[0.1, 0.2, 0.3])
    replies = [(0, 0, reply) for reply in (good, bad, good[:-1])]
    found = Side.of([Voice("one", 1, (exchange,))], Outcome(1.0, 0.1, {"one": tally}, replies))
    assert (found.checked, found.wrong) == (3, 2)
    assert (found.answered, found.asked) == (1, 3)
    assert (found.p50_ms, found.p99_ms) == (200.0, 300.0)


def test_memory_is_judged_after_the_warm_up_and_not_by_a_short_run():
    level = [(float(second), 100 if second < 50 else 200) for second in range(240)]
    assert slope_percent(level) == pytest.approx(0.0, abs=1e-6)
    rising = [(float(second), 10**9 + 10**5 * second) for second in range(240)]
    assert slope_percent(rising) == pytest.approx(6.0, rel=0.05)
    assert slope_percent(level[:100]) is None
