"""`veilhead-server tenants`, and `run` with and without them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import httpx2
import pytest
from support.services import running
from support.tenants import bearer
from typer.testing import CliRunner

from veilhead_service.cli import app
from veilhead_service.state import State
from veilhead_service.tenants import KeyScope, key_id_of, opens


@pytest.fixture
def run(tmp_path):
    runner = CliRunner()

    def invoke(*arguments, code=0):
        done = runner.invoke(
            app, ["tenants", *arguments, "--state", str(tmp_path)], env={"COLUMNS": "200"}
        )
        assert done.exit_code == code, done.output
        assert "Traceback" not in done.output
        return done

    return invoke


@pytest.fixture
def keys(tmp_path):
    def found():
        with State(tmp_path) as state:
            return {key.id: key for key in state.api_keys()}

    return found


@pytest.fixture
def listed(run):
    return lambda: json.loads(run("list", "--json").stdout)


def written_in(done):
    """The key on standard output, where there is nothing else."""
    assert re.fullmatch(r"vh_[0-9a-f]{16}_[\w-]{43}\n", done.stdout)
    assert done.stdout.strip() not in done.stderr
    return done.stdout.strip()


def test_a_key_is_shown_once_and_opens(run, keys):
    written = written_in(run("add", "clinic"))
    (key,) = keys().values()
    assert opens(key, written, now=time.time())
    secret = written.split("_", 2)[2]
    for command in (["list"], ["list", "--json"], ["audit"]):
        shown = run(*command).output
        assert "clinic" in shown
        assert key.id in shown
        assert secret not in shown
        assert key.secret_digest.hex() not in shown


def test_scopes_and_expiry(run, keys):
    written = written_in(run("add", "scraper", "--scope", "metrics", "--expires", "0.5"))
    key = keys()[key_id_of(written)]
    assert key.scopes == {KeyScope.METRICS}
    assert abs(key.expires - key.created - 43200) < 1
    run("add", "other", "--scope", "everything", code=2)


def test_rotation_leaves_the_old_key_its_grace(run, keys):
    old = written_in(run("add", "clinic", "--scope", "infer", "--expires", "10"))
    new = written_in(run("rotate", "clinic", "--grace", "2"))
    now = time.time()
    found = keys()
    assert opens(found[key_id_of(old)], old, now=now + 7190)
    assert not opens(found[key_id_of(old)], old, now=now + 7210)
    assert opens(found[key_id_of(new)], new, now=now + 7210)
    # Scopes and length of life go on.
    assert found[key_id_of(new)].scopes == {KeyScope.INFER}
    assert not opens(found[key_id_of(new)], new, now=now + 10 * 86400 + 10)


def test_rotation_without_grace_ends_the_old_key_now(run, keys):
    old = written_in(run("add", "clinic"))
    run("rotate", "clinic", "--grace", "0")
    assert not opens(keys()[key_id_of(old)], old, now=time.time())


def test_revocation_is_of_one_key_or_all(run, listed):
    run("add", "clinic")
    new = written_in(run("rotate", "clinic"))
    assert "1 keys" in run("revoke", "clinic", "--key", key_id_of(new)).stdout
    assert [key["status"] for key in listed()[0]["keys"]] == ["active", "revoked"]
    run("revoke", "clinic")
    assert [key["status"] for key in listed()[0]["keys"]] == ["revoked", "revoked"]


def test_limits_are_listed(run, listed):
    run("add", "clinic")
    run("limit", "clinic", "--model", "icd", "--budget", "100", "--period", "month")
    run("limit", "clinic", "--rate", "2.5")
    run("limit", "clinic", "--burst", "7")  # leaves the rate
    (row,) = listed()
    assert row["budgets"] == [{"model": "icd", "budget": 100, "period": "month"}]
    assert (row["rate_per_second"], row["burst"]) == (2.5, 7)
    assert "icd: 100 a month" in run("list").stdout


def test_what_was_done_is_kept(run):
    run("add", "clinic")
    run("limit", "clinic", "--rate", "2")
    run("rotate", "clinic")
    run("revoke", "clinic")
    lines = [json.loads(line) for line in run("audit").stdout.splitlines()]
    assert [line["action"] for line in lines] == ["add", "limit", "rotate", "revoke", "revoke"]
    assert {line["tenant"] for line in lines} == {"clinic"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "clinic"], "already"),
        (["add", "Clinic"], "lower-case"),
        (["add", "insecure-local"], "insecure-local"),
        (["add", "new", "--expires", "1e300"], "hundred years"),
        (["rotate", "absent"], "no such tenant"),
        (["rotate", "clinic", "--grace", "1e9"], "hundred years"),
        (["revoke", "absent"], "no such tenant"),
        (["revoke", "clinic", "--key", "0" * 16], "no such key"),
        (["limit", "absent", "--rate", "1"], "no such tenant"),
        (["limit", "clinic"], "nothing to set"),
        (["limit", "clinic", "--model", "m"], "together"),
        (["limit", "clinic", "--model", "a b", "--budget", "1"], "name of a model"),
        (["limit", "clinic", "--rate", "0"], "more than 0"),
        (["limit", "clinic", "--rate", "nan"], "more than 0"),
    ],
)
def test_errors_are_one_line_and_change_nothing(run, listed, arguments, message):
    run("add", "clinic")
    before = listed()
    done = run(*arguments, code=1)
    assert message in done.stderr
    assert done.stderr.startswith("veilhead-server: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert listed() == before


def test_run_serves_those_with_a_key(store, tmp_path, run):
    written = written_in(run("add", "clinic"))
    access = ("--state", str(tmp_path))
    with running(store, "--workers", "1", access=access) as url:

        def status(headers=None):
            return httpx2.get(f"{url}/v1/models", headers=headers, trust_env=False).status_code

        assert status() == 401
        assert status(bearer(written)) == 200
        run("revoke", "clinic")
        deadline = time.monotonic() + 1
        while status(bearer(written)) != 401:
            assert time.monotonic() < deadline


def run_fails(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "veilhead_service", "run", "--store", "absent", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_run_without_tenants_is_for_loopback():
    found = run_fails("--insecure-no-tenants", "--host", "0.0.0.0")  # noqa: S104
    assert "loopback" in found
    assert "tenants add" in found


def test_run_says_what_is_wrong_with_the_state(tmp_path):
    (tmp_path / "state.sqlite3").write_bytes(b"damaged " * 1000)
    assert "damaged" in run_fails("--state", str(tmp_path))
