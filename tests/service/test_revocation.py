"""Revoked stays revoked, whatever happens to the files of the state under a running service.

Over the real service in a process of its own, with tenants; what a careless operator does to its
files is done by another process.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import time

import httpx2
import pytest
from support.services import running
from support.tenants import add_tenant, bearer
from typer.testing import CliRunner

from veilhead_service.access_log_chain import FILE_NAME
from veilhead_service.cli import app
from veilhead_service.state import State
from veilhead_service.state_file import STATE_FILE
from veilhead_service.tenants import key_id_of


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def api_key(directory):
    return add_tenant(directory, "clinic")


@pytest.fixture
def serve(store, directory, tmp_path):
    """Starts the real service on the state."""

    @contextlib.contextmanager
    def start(*arguments, ready=True):
        log = (tmp_path / "log").open("ab")
        given = ("--workers", "1", "--state", str(directory), *arguments)
        path = "/readyz" if ready else "/livez"
        with log, running(store, *given, access=(), log=log, ready=path) as url:
            yield url

    return start


def tenants(directory, *arguments):
    return CliRunner().invoke(app, ["tenants", *arguments, "--state", str(directory)])


def ask(url, api_key):
    return httpx2.get(f"{url}/v1/models", headers=bearer(api_key), trust_env=False, timeout=20)


def within(seconds, condition):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def back_up(directory):
    """A consistent copy, as docs/operations/tenants.md makes it."""
    copy = directory.with_name("copy.sqlite3")
    copy.unlink(missing_ok=True)
    source, target = sqlite3.connect(directory / STATE_FILE), sqlite3.connect(copy)
    source.backup(target)
    source.close()
    target.close()
    return copy


def moved_over(directory, copy):
    shutil.copy(copy, directory / "new")
    (directory / "new").replace(directory / STATE_FILE)


def copied_over(directory, copy):
    shutil.copyfile(copy, directory / STATE_FILE)


def deleted(directory, _):
    (directory / STATE_FILE).unlink()


def truncated(directory, _):
    (directory / STATE_FILE).open("wb").close()


def without_log(directory, _):
    (directory / f"{STATE_FILE}-wal").unlink()


def without_index(directory, _):
    (directory / f"{STATE_FILE}-shm").unlink()


def moved_away(directory, _):
    directory.rename(directory.with_name("elsewhere"))
    directory.mkdir()


def refused(url, api_key):
    answer = ask(url, api_key)
    if answer.status_code != 503:
        return False
    assert answer.json()["type"] == "urn:veilhead:problem:state-unavailable"
    ready = httpx2.get(f"{url}/readyz", trust_env=False)
    assert (ready.status_code, ready.json()["reason"]) == (503, "state-unavailable")
    assert httpx2.get(f"{url}/livez", trust_env=False).status_code == 200
    return True


@pytest.mark.parametrize(
    "fault",
    [moved_over, copied_over, deleted, truncated, without_log, without_index, moved_away],
    ids=lambda fault: fault.__name__,
)
def test_a_state_that_is_not_the_one_that_was_opened_opens_nothing(
    serve, directory, api_key, fault
):
    copy = back_up(directory)
    with serve() as url:
        assert ask(url, api_key).status_code == 200
        fault(directory, copy)
        within(2, lambda: refused(url, api_key))
        # A command on what is there now must not make the service believe in it.
        tenants(directory, "revoke", "clinic")
        for _ in range(8):
            assert refused(url, api_key)
            time.sleep(0.1)


def test_a_state_that_is_put_back_is_used_again(serve, directory, api_key):
    with serve() as url:
        (directory / STATE_FILE).rename(directory / "aside")
        within(2, lambda: refused(url, api_key))
        (directory / "aside").rename(directory / STATE_FILE)
        within(2, lambda: ask(url, api_key).status_code == 200)
        assert tenants(directory, "revoke", "clinic").exit_code == 0
        within(2, lambda: ask(url, api_key).status_code == 401)


def restore(directory, copy):
    """As docs/operations/tenants.md says, while no service runs."""
    shutil.copy(copy, directory / STATE_FILE)
    for end in ("-wal", "-shm"):
        (directory / f"{STATE_FILE}{end}").unlink(missing_ok=True)


@pytest.mark.parametrize("revoked_while_it_runs", [True, False], ids=["running", "stopped"])
@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_restored_backup_lets_nobody_in_before_it_is_accepted(
    serve, directory, api_key, mode, revoked_while_it_runs
):
    other = add_tenant(directory, "insurer")
    arguments = ("--set", f"access_log={mode}")
    with serve(*arguments) as url:
        copy = back_up(directory)
        if revoked_while_it_runs:
            assert tenants(directory, "revoke", "clinic").exit_code == 0
            within(2, lambda: ask(url, api_key).status_code == 401)
    if not revoked_while_it_runs:
        assert tenants(directory, "revoke", "clinic").exit_code == 0
    restore(directory, copy)
    with serve(*arguments, ready=False) as url:
        within(5, lambda: refused(url, api_key))
        assert refused(url, other)
        done = tenants(directory, "limit", "insurer", "--rate", "5")
        assert (done.exit_code, "accept-restored" in done.stderr) == (1, True)
        done = tenants(directory, "accept-restored")
        assert done.exit_code == 0, done.output
        assert f"ended again: key {key_id_of(api_key)} of clinic" in done.stdout
        assert key_id_of(other) not in done.stdout
        within(2, lambda: ask(url, other).status_code == 200)
        assert ask(url, api_key).status_code == 401
        assert "nothing to accept" in tenants(directory, "accept-restored").stdout
        assert tenants(directory, "revoke", "insurer").exit_code == 0
        within(2, lambda: ask(url, other).status_code == 401)
    with serve(*arguments) as url:  # and after a restart
        assert ask(url, api_key).status_code == 401
        assert ask(url, other).status_code == 401


def test_what_rotation_ended_stays_ended_too(serve, directory, api_key):
    copy = back_up(directory)
    done = tenants(directory, "rotate", "clinic", "--grace", "0")
    assert done.exit_code == 0, done.output
    new = done.stdout.strip()
    with serve() as url:
        assert ask(url, api_key).status_code == 401
        assert ask(url, new).status_code == 200
    restore(directory, copy)
    with serve(ready=False) as url:
        within(5, lambda: refused(url, api_key))
        assert "ended again" in tenants(directory, "accept-restored").stdout
        within(2, lambda: ask(url, api_key).status_code == 401)


def test_another_history_of_the_same_length_is_refused(serve, directory, api_key):
    """Two branches of one state, each with one revocation."""
    other = add_tenant(directory, "insurer")
    with serve():
        pass
    copy = back_up(directory)
    assert tenants(directory, "revoke", "clinic").exit_code == 0
    restore(directory, copy)
    log = directory / FILE_NAME
    kept = log.read_bytes()
    log.unlink()  # so that the command has nothing to compare with
    with State(directory) as state:
        state.note_logged(0, 0, "")
    assert tenants(directory, "revoke", "insurer").exit_code == 0
    log.write_bytes(kept)
    with serve(ready=False) as url:
        within(5, lambda: refused(url, api_key))
        assert tenants(directory, "accept-restored").exit_code == 1  # it knows of another log
        done = tenants(directory, "accept-restored", "--without-log")
        assert key_id_of(api_key) in done.stdout  # what this log knows counts all the same
        within(2, lambda: ask(url, api_key).status_code == 401)
        assert ask(url, other).status_code == 401  # its own revocation is not forgotten


def test_a_state_made_anew_in_its_place_is_refused(serve, directory, api_key):
    with serve():
        assert tenants(directory, "revoke", "clinic").exit_code == 0
    for file in directory.glob(f"{STATE_FILE}*"):
        file.unlink()
    written = add_tenant(directory, "clinic")
    with serve(ready=False) as url:
        within(5, lambda: refused(url, written))
        done = tenants(directory, "accept-restored")
        assert "not in this state" in done.stdout
        within(2, lambda: ask(url, written).status_code == 200)
        assert ask(url, api_key).status_code == 401


@pytest.mark.parametrize("loss", ["removed", "emptied", "cut"])
def test_a_log_that_lost_its_end_is_no_witness(serve, directory, api_key, loss):
    with serve() as url:
        ask(url, api_key)
        assert tenants(directory, "revoke", "clinic").exit_code == 0
        within(2, lambda: ask(url, api_key).status_code == 401)
    log = directory / FILE_NAME
    if loss == "removed":
        log.unlink()
    else:
        rows = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"" if loss == "emptied" else rows[0])
    verified = CliRunner().invoke(app, ["access-log", "verify", str(log)])
    assert verified.exit_code == 1
    for _ in range(2):  # a restart does not wear the refusal down
        with serve(ready=False) as url:
            within(5, lambda: refused(url, api_key))
    done = tenants(directory, "accept-restored")
    assert (done.exit_code, "--without-log" in done.stderr) == (1, True)
    assert tenants(directory, "accept-restored", "--without-log").exit_code == 0
    with serve() as url:
        assert ask(url, api_key).status_code == 401


def test_a_revocation_that_the_running_service_does_not_see_fails(serve, directory, api_key):
    """The write-ahead log is gone, so that the command writes where the service does not read."""
    with serve() as url:
        ask(url, api_key)
        without_log(directory, None)
        without_index(directory, None)
        done = tenants(directory, "revoke", "clinic")
        assert done.exit_code == 1
        assert "Traceback" not in done.output


def test_a_log_that_is_rotated_goes_on_and_still_knows_who_was_revoked(serve, directory, api_key):
    log = directory / FILE_NAME
    other = add_tenant(directory, "insurer")
    with serve() as url:
        copy = back_up(directory)
        assert tenants(directory, "revoke", "clinic").exit_code == 0
        within(2, lambda: ask(url, api_key).status_code == 401)
        log.rename(directory / "access.log.1")
        ask(url, other)
        within(2, log.exists)
        shutil.copy(log, directory / "access.log.2")
        log.open("wb").close()  # as logrotate does with copytruncate
        ask(url, other)
        within(2, lambda: log.stat().st_size > 0)
    reasons = [json.loads(line).get("reason") for line in log.read_text().splitlines()]
    assert reasons[0] == "cut"
    files = [directory / "access.log.1", directory / "access.log.2", log]
    verify = ["access-log", "verify", *map(str, files)]
    assert CliRunner().invoke(app, verify).exit_code == 0
    assert CliRunner().invoke(app, [*verify[:2], str(log)]).exit_code == 1
    restore(directory, copy)
    with serve(ready=False) as url:
        within(5, lambda: refused(url, api_key))
        assert key_id_of(api_key) in tenants(directory, "accept-restored").stdout
        within(2, lambda: ask(url, api_key).status_code == 401)
