"""The short form of the hostile run, and that it sees what it looks for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from veilhead_benchmarks.cli import app as commands
from veilhead_benchmarks.hostile import PROBLEMS, HostileReport, run_hostile, show

SEED = 20261122

#: Problems that nothing a client sends brings about, or that no service sends.
NOT_FROM_REQUESTS = {"wrong-key", "wrong-query", "model-unavailable", "internal"}


def test_no_hostile_request_breaks_a_promise(tmp_path):
    report = run_hostile(requests=1500, seed=SEED)
    assert report.violations == []
    assert report.passed
    assert report.requests == 1500
    assert report.checks == 3
    assert report.evaluations >= 30
    statuses = {status for _, status, _ in report.answers}
    assert {200, 201, 204, 206, 400, 401, 403, 404, 405, 409, 410, 413, 415, 416, 422} <= statuses
    show(report, tmp_path / "new" / "summary.json")
    summary = json.loads((tmp_path / "new" / "summary.json").read_text("utf-8"))
    assert summary["violations"] == 0
    assert sum(row["count"] for row in summary["answers"]) == 1500


def test_the_table_of_problems_is_the_documented_one():
    page = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\d{3}) \| (yes|no) \|", page, re.MULTILINE)
    documented = {
        (int(status), code, retryable == "yes")
        for code, status, retryable in rows
        if code not in NOT_FROM_REQUESTS
    }
    assert documented == PROBLEMS


# --- it can fail: apps that break one promise each ------------------------------------------------


def altered(change):
    """An app around the real one whose answers to refused queries are changed."""

    def around(app):
        async def changed(scope, receive, send):
            if not scope["path"].endswith("/infer"):
                await app(scope, receive, send)
                return
            messages = []

            async def keep(message):
                messages.append(message)

            await app(scope, receive, keep)
            if messages[0]["status"] >= 400:
                change(scope, messages)
            for message in messages:
                await send(message)

        return changed

    return around


def fail(scope, messages):
    messages[0]["status"] = 500


def echo(scope, messages):
    document = json.loads(messages[1]["body"])
    document["detail"] += " " + scope["raw_path"].decode()
    messages[1]["body"] = json.dumps(document).encode()


def tell_of_another(scope, messages):
    document = json.loads(messages[1]["body"])
    document["detail"] += " first-hospital second-insurer"
    messages[1]["body"] = json.dumps(document).encode()


def drop_the_id(scope, messages):
    messages[0]["headers"] = [
        header for header in messages[0]["headers"] if header[0].lower() != b"x-request-id"
    ]


def stop_early(scope, messages):
    messages[1]["more_body"] = True


def admit(scope, messages):
    messages[0]["status"] = 200


@pytest.mark.parametrize(
    ("change", "promise"),
    [
        (fail, "is not a typed problem"),
        (echo, "holds bytes of the request"),
        (tell_of_another, "another tenant"),
        (drop_the_id, "no request id"),
        (stop_early, "expected one that is complete"),
        (admit, "without a good API key"),
    ],
)
def test_an_answer_that_breaks_a_promise_is_found(change, promise):
    report = run_hostile(requests=100, seed=SEED, around=altered(change))
    assert not report.passed
    assert any(promise in violation.promise for violation in report.violations)


def test_a_violation_is_found_again_by_its_number():
    (first, *_) = run_hostile(requests=100, seed=SEED, around=raising).violations
    (again, *_) = run_hostile(requests=1, seed=SEED, only=first.number, around=raising).violations
    assert (again.number, again.promise) == (first.number, first.promise)


def raising(app):
    async def failing(scope, receive, send):
        if scope["method"] == "HEAD":
            raise RuntimeError("planted")
        await app(scope, receive, send)

    return failing


def test_an_exception_out_of_the_app_is_found():
    report = run_hostile(requests=100, seed=SEED, around=raising)
    assert any("RuntimeError came out" in found.promise for found in report.violations)


def test_a_run_of_nothing_has_not_passed():
    assert not HostileReport(seed=1).passed


def test_the_command_sends_one_request_alone():
    done = CliRunner().invoke(commands, ["hostile", "--seed", "3", "--only", "7"])
    assert done.exit_code == 0, done.output
    assert "1 requests" in done.output
