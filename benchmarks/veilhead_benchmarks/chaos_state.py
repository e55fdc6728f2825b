"""Faults of the files of the state and of the access log, under a running service."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import time
from pathlib import Path
from typing import Final

import httpx2

from veilhead_benchmarks.chaos_load import Bench, Outcome
from veilhead_service.access_log_chain import FILE_NAME
from veilhead_service.state_file import BUSY_SECONDS, STATE_FILE

#: What a request may take beyond the wait for a lock, on a machine that is busy.
_MARGIN_SECONDS: Final = 3.0

#: Of a lock that another process holds, at most.
_LOCK_SECONDS: Final = 45.0


def lock_state(bench: Bench) -> Outcome:
    """Another process holds the state: queries get 503 in time, and who is not charged goes on."""
    slowest = {"/v1/models": 0.0, "/v1/usage": 0.0}

    def ask(path: str, until: float) -> None:
        headers = {"Authorization": f"Bearer {own.tenants.api_keys[0]}"}
        while time.monotonic() < until:
            started = time.monotonic()
            httpx2.get(own.service.url + path, headers=headers, trust_env=False, timeout=120)
            slowest[path] = max(slowest[path], time.monotonic() - started)

    def disturb(outcome: Outcome) -> None:
        seconds = min(_LOCK_SECONDS, 3 * bench.seconds)
        lock = sqlite3.connect(own.tenants.state / STATE_FILE, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=ask, args=(path, until)) for path in slowest]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lock.execute("ROLLBACK")
        lock.close()
        outcome.notes.append(f"locked for {seconds:.0f} s")
        for path, took in slowest.items():
            outcome.notes.append(f"slowest {path}: {took:.2f} s")
            outcome.expect(took < BUSY_SECONDS + _MARGIN_SECONDS, f"{path} took {took:.1f} s")

    with bench.another("locked") as own:
        return own.under_load("state locked", disturb, may_fail=True)


def _refuses(bench: Bench, outcome: Outcome) -> None:
    """For a while nobody is let in, and the service says why."""
    headers = {"Authorization": f"Bearer {bench.tenants.api_keys[0]}"}
    time.sleep(1.0)
    until = time.monotonic() + bench.seconds / 3
    while time.monotonic() < until:
        answer = httpx2.get(
            f"{bench.service.url}/v1/models", headers=headers, trust_env=False, timeout=20
        )
        outcome.expect(
            answer.status_code == 503 and "state-unavailable" in answer.text,
            f"with another state in its place the service answered {answer.status_code}",
        )
        time.sleep(0.05)
    outcome.expect(bench.service.status("/readyz") == 503, "/readyz did not tell")


def replace_state(bench: Bench) -> Outcome:
    """An older backup is moved over the state, which is then put back."""

    def disturb(outcome: Outcome) -> None:
        file = own.tenants.state / STATE_FILE
        file.rename(own.tenants.state / "aside")
        shutil.copyfile(own.tenants.backup, own.tenants.state / "new")
        (own.tenants.state / "new").rename(file)
        _refuses(own, outcome)
        (own.tenants.state / "aside").rename(file)

    with bench.another("replaced") as own:
        return own.under_load("state replaced, put back", disturb, may_fail=True)


def delete_state(bench: Bench) -> Outcome:
    """The state is deleted; a second name of the same file brings it back."""

    def disturb(outcome: Outcome) -> None:
        file, aside = own.tenants.state / STATE_FILE, own.tenants.state / "aside"
        os.link(file, aside)
        file.unlink()
        _refuses(own, outcome)
        os.link(aside, file)

    with bench.another("deleted") as own:
        return own.under_load("state deleted, put back", disturb, may_fail=True)


def overwrite_state(bench: Bench) -> Outcome:
    """An older backup is copied over the open file; then it is restored as the manual says."""

    def disturb(outcome: Outcome) -> None:
        shutil.copyfile(own.tenants.backup, own.tenants.state / STATE_FILE)
        _refuses(own, outcome)
        own.service.kill()
        _restore(own, outcome)

    with bench.another("overwritten") as own:
        return own.under_load(
            "state overwritten, restored", disturb, may_fail=True, losses=1, forgets=True
        )


def restore_state(bench: Bench) -> Outcome:
    """The service is stopped, and started on a backup from before a revocation."""

    def disturb(outcome: Outcome) -> None:
        own.service.terminate()
        _restore(own, outcome)

    with bench.another("restored") as own:
        return own.under_load("state restored", disturb, may_fail=True, losses=1, forgets=True)


def _restore(bench: Bench, outcome: Outcome) -> None:
    bench.tenants.restore()
    bench.service.start(until="/livez")
    _refuses(bench, outcome)
    told = bench.tenants.command("accept-restored")
    outcome.expect("1 keys ended again" in told, "accept-restored did not end the revoked key")


def lose_side_files(bench: Bench) -> Outcome:
    """The files beside the state are removed; the service is stopped and started again."""

    def disturb(outcome: Outcome) -> None:
        for end in ("-wal", "-shm"):
            (own.tenants.state / f"{STATE_FILE}{end}").unlink()
        _refuses(own, outcome)
        own.service.terminate()
        own.service.start()

    with bench.another("side-files") as own:
        return own.under_load("state's log removed", disturb, may_fail=True, losses=1)


def rotate_log(bench: Bench) -> Outcome:
    """Another program renames the access log again and again."""
    files: list[Path] = []

    def disturb(outcome: Outcome) -> None:
        for number in range(1, 6):
            moved = own.tenants.state / f"{FILE_NAME}.{number}"
            (own.tenants.state / FILE_NAME).rename(moved)
            files.append(moved)
            time.sleep(bench.seconds / 6)
        outcome.notes.append(f"renamed {len(files)} times")

    with bench.another("rotated") as own:
        outcome = own.under_load("access log rotated", disturb, may_fail=False)
        broken = own.tenants.verify_log([*files, own.tenants.state / FILE_NAME])
        outcome.expect(not broken, f"the chain of the access log is broken: {broken}")
        outcome.expect(
            bool(own.tenants.verify_log()), "a part of the access log was taken for all of it"
        )
    return outcome
