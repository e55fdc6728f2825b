"""Faults of processes, senders, clocks, stores and disks."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from veilhead import Client, VeilheadError
from veilhead_benchmarks.chaos_load import MODEL, Bench, Outcome, kind_of
from veilhead_benchmarks.processes import is_running, publish_random, unit_rows
from veilhead_models.artifact import HEAD_FILE, MANIFEST_FILE
from veilhead_service.store_versions import FORMAT_FILE

#: A worker whose service was killed ends within this: its query ends, and its socket is closed.
_GONE_SECONDS: Final = 5.0

_SLOW_CLIENTS: Final = 100
_JUMP_DAYS: Final = 40


def kill_workers(bench: Bench) -> Outcome:
    """Workers are killed one after the other, each once the last was replaced."""

    def disturb(outcome: Outcome) -> None:
        killed = 0
        deadline = time.monotonic() + bench.seconds
        while time.monotonic() < deadline:
            workers = bench.service.workers()
            if len(workers) == 2:  # the last one has been replaced
                os.kill(random.choice(workers), signal.SIGKILL)  # noqa: S311
                killed += 1
            time.sleep(0.5)
        outcome.notes.append(f"{killed} workers killed")
        outcome.expect(killed > 0, "no worker was killed")

    return bench.under_load("SIGKILL of workers", disturb, may_fail=False)


def kill_service(bench: Bench) -> Outcome:
    """The service is killed and started again."""

    def disturb(outcome: Outcome) -> None:
        left = bench.service.workers()
        bench.service.kill()
        time.sleep(0.5)
        bench.service.start()
        deadline = time.monotonic() + _GONE_SECONDS
        while any(map(is_running, left)) and time.monotonic() < deadline:
            time.sleep(0.1)
        outcome.expect(not any(map(is_running, left)), "workers outlived the service")

    return bench.under_load("SIGKILL of the service", disturb, may_fail=True, losses=1)


def terminate(bench: Bench) -> Outcome:
    """The service is told to stop, and started again."""

    def disturb(outcome: Outcome) -> None:
        started = time.monotonic()
        status = bench.service.terminate()
        outcome.expect(status == 0, f"the service ended with status {status}, not 0")
        outcome.notes.append(f"ended after {time.monotonic() - started:.1f} s")
        bench.service.start()

    return bench.under_load("SIGTERM", disturb, may_fail=True, losses=1)


def _connect(bench: Bench, header: str) -> socket.socket:
    """A connection that has sent the header of a query to the model `good`."""
    connection = socket.create_connection(("127.0.0.1", bench.service.port), timeout=20)
    lines = [f"POST /v1/models/{MODEL}/infer HTTP/1.1", "Host: 127.0.0.1"]
    lines += [f"Authorization: Bearer {bench.tenants.api_keys[0]}"]
    lines += ["Content-Type: application/octet-stream", header]
    connection.sendall("".join(f"{line}\r\n" for line in [*lines, ""]).encode())
    return connection


def _status(connection: socket.socket) -> str:
    try:
        return connection.recv(65536).split(b" ")[1].decode("ascii")
    except (OSError, IndexError):
        return "none"


def send_slowly(bench: Bench) -> Outcome:
    """Many clients send half a body and stop."""

    def disturb(outcome: Outcome) -> None:
        query = bench.query()
        with ExitStack() as stack:
            slow = []
            for _ in range(_SLOW_CLIENTS):
                length = f"Content-Length: {len(query)}"
                connection = stack.enter_context(_connect(bench, length))
                connection.sendall(query[: len(query) // 2])
                slow.append(connection)
            statuses = Counter(_status(connection) for connection in slow)
        outcome.notes.append(f"answers to {_SLOW_CLIENTS} slow clients: {dict(statuses)}")
        outcome.expect(statuses.keys() == {"408"}, "a slow client was not answered with 408")

    return bench.under_load("slow clients", disturb, may_fail=False)


def send_too_much(bench: Bench) -> Outcome:
    """Bodies that say that they are too long, and that turn out to be."""

    def disturb(outcome: Outcome) -> None:
        statuses: Counter[str] = Counter()
        query = bench.query()
        for _ in range(10):
            with _connect(bench, f"Content-Length: {2**40}") as connection:
                statuses[f"{_status(connection)} by its length"] += 1
            with _connect(bench, "Transfer-Encoding: chunked") as connection:
                # A byte too many, and a gigabyte still to come that nobody waits for.
                connection.sendall(f"{2**30:x}\r\n".encode() + query + b"x")
                statuses[f"{_status(connection)} as it comes"] += 1
        outcome.notes.append(f"answers to oversized bodies: {dict(statuses)}")
        outcome.expect(
            statuses.keys() == {"413 by its length", "422 as it comes"},
            "an oversized body was not refused at once",
        )

    return bench.under_load("oversized bodies", disturb, may_fail=False)


def jump(bench: Bench) -> Outcome:
    """The service reads a clock that a file sets; monotonic time goes on."""
    code = bench.work / "clock"
    code.mkdir()
    (code / "sitecustomize.py").write_text(
        "import os, time\n"
        "_time = time.time\n"
        f"_jumped = {str(code / 'jumped')!r}\n"
        "def _shifted():\n"
        "    try:\n"
        "        with open(_jumped) as file:\n"
        "            return _time() + float(file.read())\n"
        "    except (OSError, ValueError):\n"
        "        return _time()\n"
        "time.time = _shifted\n",
        "utf-8",
    )

    def disturb(outcome: Outcome) -> None:
        for days in (_JUMP_DAYS, -_JUMP_DAYS):
            pending = code / "pending"
            pending.write_text(str(days * 86400), "ascii")
            pending.replace(code / "jumped")
            time.sleep(bench.seconds / 3)
        outcome.notes.append(f"{_JUMP_DAYS} days forward, then as many back")

    path = os.pathsep.join([str(code), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with bench.another("jump", environment={"PYTHONPATH": path}) as own:
        return own.under_load("clock jump", disturb, may_fail=False)


def corrupt(bench: Bench) -> Outcome:
    """Damaged models beside a good one, found at start."""
    damaged = {}
    for name in ("manifest-cut", "pointer-bad", "head-flipped"):
        store = bench.work / "corrupt"
        publish_random(store, bench.work / "corrupt-artifacts", name, 3, 32)
        damaged[name] = store / name / (store / name / "current").read_text("ascii").strip()
    manifest = damaged["manifest-cut"] / MANIFEST_FILE
    manifest.write_bytes(manifest.read_bytes()[:100])
    (bench.work / "corrupt" / "pointer-bad" / "current").write_bytes(b"\xff../../etc\n")
    head = damaged["head-flipped"] / HEAD_FILE
    content = bytearray(head.read_bytes())
    content[-1] ^= 0xFF
    head.write_bytes(content)
    shutil.copytree(bench.store / "good", bench.work / "corrupt" / "good")

    def disturb(outcome: Outcome) -> None:
        for name in damaged:
            try:
                with Client(own.service.url, name, api_key=own.tenants.api_keys[0]) as client:
                    client.logits(unit_rows(1, 32, 1))
            except VeilheadError as error:
                outcome.notes.append(f"{name}: {kind_of(error)}")
            else:
                outcome.failures.append(f"{name} was answered")

    with bench.another("corrupt", store=bench.work / "corrupt") as own:
        outcome = own.under_load("corrupt store", disturb, may_fail=False)
    text = (bench.work / "corrupt.log").read_text("utf-8", "replace")
    for name in damaged:
        outcome.expect(name in text, f"the log does not name {name}")
    return outcome


@contextmanager
def _small_disk(work: Path) -> Iterator[tuple[Path, str]]:
    """A directory on a disk of 8 MB, or an ordinary one and why it is not small."""
    directory = work / "disk"
    directory.mkdir()
    mount = shutil.which("mount")
    mounted = mount and subprocess.run(  # noqa: S603
        [mount, "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)],
        capture_output=True,
        check=False,
    )
    if not mount or not mounted or mounted.returncode:
        yield directory, "no tmpfs may be mounted here: the publisher's files are limited instead"
        return
    try:
        yield directory, ""
    finally:
        subprocess.run(  # noqa: S603
            [shutil.which("umount") or "umount", "--lazy", str(directory)], check=True
        )


def _fill(directory: Path) -> None:
    with (directory / "filling").open("wb", buffering=0) as file:
        for size in (2**16, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


_PUBLISH_LIMITED: Final = (
    "import resource, sys\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
    "from veilhead_service.cli import app\n"
    "app(sys.argv[1:])\n"
)


def fill_disk(bench: Bench) -> Outcome:
    """Store, state and log on a disk that is full: nothing is answered that cannot be recorded."""
    with _small_disk(bench.work) as (disk, reason):
        shutil.copytree(bench.store / "good", disk / "store" / "good")
        shutil.copy(bench.store / FORMAT_FILE, disk / "store")
        publish_random(bench.work / "unused", bench.work, "late", 60, 384)
        publisher = ["-c", _PUBLISH_LIMITED] if reason else ["-m", "veilhead_service"]

        def disturb(outcome: Outcome) -> None:
            if reason:
                outcome.notes.append(reason)
            else:
                _fill(disk)
            done = subprocess.run(  # noqa: S603
                [sys.executable, *publisher, "publish", str(bench.work / "artifacts" / "late"),
                 "--store", str(disk / "store")],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            outcome.expect(done.returncode == 1, "publishing to a full disk did not fail")
            outcome.expect("Traceback" not in done.stderr, "publishing failed without a reason")
            outcome.expect(
                not (disk / "store" / "late" / "current").exists(), "half a model is published"
            )
            (disk / "filling").unlink(missing_ok=True)

        with bench.another("disk", store=disk / "store", state=disk / "state") as own:
            return own.under_load("full disk", disturb, may_fail=True, losses=1)
