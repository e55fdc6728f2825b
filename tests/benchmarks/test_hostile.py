"""The short form of the hostile run, and that it sees what it looks for."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from veilhead_benchmarks.cli import app as commands
from veilhead_benchmarks.hostile import PROBLEMS, HostileReport, run_hostile, show
from veilhead_benchmarks.hostile.wire import Request
from veilhead_benchmarks.hostile.world import Held

SEED = 20261122

#: Problems that nothing a client sends brings about, or that no service sends.
NOT_FROM_REQUESTS = {"wrong-key", "wrong-query", "model-unavailable", "internal"}


def test_no_hostile_request_breaks_a_promise(tmp_path):
    report = run_hostile(requests=8000, seed=SEED)
    assert report.violations == []
    assert report.passed
    assert report.requests >= 8000
    assert report.checks >= 2
    assert report.evaluations >= 10
    assert report.lives > 0
    shapes = {"request", "stream", "flood", "unfinished", "crowd", "ambiguous", "trailers"}
    assert shapes | {"garbled"} <= set(report.sent)
    statuses = {status for _, status, _ in report.answers}
    assert {200, 201, 204, 400, 401, 403, 404, 405, 409, 410, 415, 422} <= statuses
    show(report, tmp_path / "new" / "summary.json")
    summary = json.loads((tmp_path / "new" / "summary.json").read_text("utf-8"))
    assert summary["violations"] == 0
    assert summary["end"]["descriptors"] <= summary["warm"]["descriptors"] + 6
    assert sum(row["count"] for row in summary["answers"]) > 7000


def test_the_table_of_problems_is_the_documented_one():
    page = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\d{3}) \| (yes|no) \|", page, re.MULTILINE)
    documented = {
        (int(status), code, retryable == "yes")
        for code, status, retryable in rows
        if code not in NOT_FROM_REQUESTS
    }
    assert documented == PROBLEMS


# --- it can fail: answers that break one promise each ---------------------------------------------


def refused_query(request, answer):
    return request.path.endswith("/infer") and answer.status >= 400 and answer.body


def fail(request, answer):
    answer.status = 500


def echo(request, answer):
    document = json.loads(answer.body)
    document["detail"] += " " + request.target.encode("ascii", "replace").decode()
    answer.body = json.dumps(document).encode()


def tell_of_another(request, answer):
    document = json.loads(answer.body)
    document["detail"] += " first-hospital second-insurer"
    answer.body = json.dumps(document).encode()


def drop_the_id(request, answer):
    answer.headers.pop("x-request-id")


def admit(request, answer):
    answer.status = 200


@pytest.fixture(scope="module")
def broken_answers():
    """What one run finds whose refused queries are altered, each in the next of these ways."""
    changes = (fail, echo, tell_of_another, drop_the_id, admit)
    changed = []

    def around(request, answer):
        if refused_query(request, answer):
            change = changes[len(changed) % len(changes)]
            changed.append(change)
            change(request, answer)

    report = run_hostile(requests=1500, seed=SEED, around=around)
    assert set(changed) == set(changes)
    return report


@pytest.mark.parametrize(
    "promise",
    [
        "is not a typed problem",
        "holds bytes of the request",
        "another tenant",
        "no request id",
        "without a good API key",
    ],
)
def test_an_answer_that_breaks_a_promise_is_found(broken_answers, promise):
    assert not broken_answers.passed
    assert any(promise in violation.promise for violation in broken_answers.violations)


def test_a_violation_is_found_again_by_its_number():
    def around(request, answer):
        if request.method == "HEAD":
            answer.status = 500

    (first, *_) = run_hostile(requests=600, seed=SEED, around=around).violations
    (again, *_) = run_hostile(requests=1, seed=SEED, only=first.number, around=around).violations
    assert (again.number, again.promise) == (first.number, first.promise)


#: A service without its bounds on connections: the module that Python imports at its start.
UNBOUND = """\
from veilhead_service import connections, framing
framing.MAX_PIPELINED = 10**9
framing.Framing._is_addressed = lambda *_: True
connections.Connection._bound = lambda *_: None  # what is not read is kept
begin = connections.Connection.begin_answer
connections.Connection.begin_answer = lambda self: begin(self) + 10**6  # trailers are headers
connections.Connections.add = lambda self, connection: (
    self._peers.setdefault(connection.peer, connections._Peer()), self.wait(connection), True
)[-1]
connections.Connections.remove = lambda self, connection: self.work(connection)
connections.Connections.close_stalled = lambda self: None
"""


def test_a_service_without_its_bounds_is_found(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(UNBOUND, "utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    report = run_hostile(requests=4000, seed=SEED, environment={"PYTHONPATH": path})
    found = "\n".join(f"{one.request} {one.promise}" for one in report.violations)
    assert "one address holds" in found
    assert "the service did not end it" in found
    assert "an API key in the trailers" in found
    assert "read in two ways" in found


@pytest.mark.parametrize(
    ("end", "promise"),
    [
        (Held(900 * 2**20, 20, 0), "memory grew by 700 MiB"),
        (Held(200 * 2**20, 40, 0), "20 more files"),
        (Held(200 * 2**20, 20, 2**26), "67108864 bytes were written for 100"),
        (Held(210 * 2**20, 22, 2**20), None),
    ],
)
def test_a_service_that_grows_is_found(end, promise):
    report = HostileReport(1, requests=1, checks=1, warm=Held(200 * 2**20, 20, 0), end=end)
    report.judge_level(7, 100)
    assert (
        [one.promise for one in report.violations if promise in one.promise]
        if promise
        else (report.passed)
    )


def test_a_run_of_nothing_has_not_passed():
    assert not HostileReport(seed=1).passed


@pytest.mark.parametrize(
    ("request_", "plain"),
    [
        (Request("GET", "/livez"), True),
        (Request("GET", "/a%00", b"b=c"), True),
        (Request("TRACE", "/livez"), False),
        (Request("GET", "livez"), False),
        (Request("GET", "/a b"), False),
        (Request("GET", "/", headers=((b"host", b"y"),)), False),
        (Request("GET", "/", headers=((b"a", b"\0"),)), False),
    ],
)
def test_what_every_server_must_read_is_told_from_the_rest(request_, plain):
    assert request_.is_plain is plain


def test_the_command_sends_one_request_alone():
    done = CliRunner().invoke(commands, ["hostile", "--seed", "3", "--only", "7"])
    assert done.exit_code == 0, done.output
    assert "1 requests" in done.output
