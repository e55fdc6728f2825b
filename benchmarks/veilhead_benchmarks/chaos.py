"""Faults under load: what callers of the SDK see while parts of a service die.

Every call must either return logits within the model's error bound or raise one typed error; none
may hang, be lost or be wrong. Where the service can hide a fault, no call may fail at all; and once
the fault is over, every client must get right answers again, without being made anew. All of it is
on loopback, in a temporary directory, and ends by itself.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from rich.table import Table

from veilhead import BatchError, Client, ServiceResponseError, VeilheadError
from veilhead.session import Session
from veilhead_benchmarks.console import wide_console
from veilhead_benchmarks.processes import ServiceProcess, is_running, publish_random, unit_rows
from veilhead_models.artifact import HEAD_FILE, MANIFEST_FILE, HeadArtifact

_CLASSES: Final = 10
_DIMENSIONS: Final = 384
_ROWS: Final = 64
_CLIENTS: Final = 4

#: A call that has not ended so long after the load is lost.
_LOST_SECONDS: Final = 90.0

#: A worker whose service was killed ends within this: its query ends, and its socket is closed.
_GONE_SECONDS: Final = 5.0

_SLOW_CLIENTS: Final = 100
_BODY_SECONDS: Final = 2.0
_JUMP_DAYS: Final = 40


@dataclass
class Outcome:
    """What callers saw during one fault.

    Attributes:
        fault: what was done to the service.
        may_fail: whether typed errors are allowed while it happens.
        calls: calls that began.
        right: calls that returned logits within the error bound.
        errors: typed errors, by code or by the service's problem.
        wrong: calls that returned anything else, or raised anything else.
        failures: further promises that were broken, in words.
        notes: what else there is to say.
    """

    fault: str
    may_fail: bool
    calls: int = 0
    right: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Calls that ended in no way at all."""
        return self.calls - self.right - self.wrong - self.errors.total()

    @property
    def passed(self) -> bool:
        """Whether everything that was promised was kept."""
        broken = self.wrong or self.lost or self.failures or not self.right
        return not broken and (self.may_fail or not self.errors)

    def expect(self, kept: bool, promise: str) -> None:
        """Note a promise that was not kept."""
        if not kept:
            self.failures.append(promise)


def _kind(error: VeilheadError) -> str:
    if isinstance(error, BatchError):
        return _kind(error.errors[min(error.errors)])
    return error.problem or error.code if isinstance(error, ServiceResponseError) else error.code


class _Load:
    """Clients that ask without pause, each on a thread of its own."""

    def __init__(self, outcome: Outcome, artifact: HeadArtifact, url: str) -> None:
        self._outcome = outcome
        self._artifact = artifact
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._stack = ExitStack()
        self._clients = [
            self._stack.enter_context(Client(url, artifact.manifest.name)) for _ in range(_CLIENTS)
        ]
        self._threads = [
            threading.Thread(target=self._run, args=(client, seed), daemon=True)
            for seed, client in enumerate(self._clients)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Stop, and let every client ask once more: that call must be right."""
        self._stop.set()
        deadline = time.monotonic() + _LOST_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for client in self._clients:
            if not any(thread.is_alive() for thread in self._threads):
                right = self._outcome.right
                self._call(client, random.Random(0))  # noqa: S311
                self._outcome.expect(self._outcome.right > right, "a client did not recover")
        self._stack.close()

    def _run(self, client: Client, seed: int) -> None:
        generator = random.Random(seed)  # noqa: S311
        while not self._stop.is_set():
            self._call(client, generator)

    def _call(self, client: Client, generator: random.Random) -> None:
        rows = unit_rows(generator.randint(1, 3), _DIMENSIONS, generator.randrange(2**30))
        with self._lock:
            self._outcome.calls += 1
        try:
            logits = client.logits(rows)
        except VeilheadError as error:
            with self._lock:
                self._outcome.errors[_kind(error)] += 1
        except Exception as error:
            with self._lock:
                self._outcome.wrong += 1
                self._outcome.failures.append(f"{type(error).__name__} came out of the SDK")
        else:
            distance = np.abs(logits - self._artifact.logits(rows)).max()
            with self._lock:
                if distance <= self._artifact.manifest.head.error_bound:
                    self._outcome.right += 1
                else:
                    self._outcome.wrong += 1


@dataclass(frozen=True)
class _Bench:
    """A service, its store and the model that is asked."""

    work: Path
    store: Path
    artifact: HeadArtifact
    service: ServiceProcess
    seconds: float

    def query(self) -> bytes:
        """A query that the service takes; any other is refused at its header."""
        row = unit_rows(1, _DIMENSIONS, 0)[0]
        return Session(self.artifact.manifest).encrypt(row).data

    def under_load(
        self, fault: str, disturb: Callable[[Outcome], None], *, may_fail: bool
    ) -> Outcome:
        """Load, the fault in its middle, and what the callers saw."""
        outcome = Outcome(fault, may_fail)
        load = _Load(outcome, self.artifact, self.service.url)
        load.start()
        time.sleep(self.seconds / 3)
        disturb(outcome)
        time.sleep(self.seconds / 3)
        outcome.expect(self.service.status("/livez") == 200, "/livez did not answer")
        load.finish()
        return outcome


# --- the faults ---------------------------------------------------------------------------------


def _kill_workers(bench: _Bench) -> Outcome:
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


def _kill_service(bench: _Bench) -> Outcome:
    def disturb(outcome: Outcome) -> None:
        left = bench.service.workers()
        bench.service.kill()
        time.sleep(0.5)
        bench.service.start()
        deadline = time.monotonic() + _GONE_SECONDS
        while any(map(is_running, left)) and time.monotonic() < deadline:
            time.sleep(0.1)
        outcome.expect(not any(map(is_running, left)), "workers outlived the service")

    return bench.under_load("SIGKILL of the service", disturb, may_fail=True)


def _terminate(bench: _Bench) -> Outcome:
    def disturb(outcome: Outcome) -> None:
        started = time.monotonic()
        status = bench.service.terminate()
        outcome.expect(status == 0, f"the service ended with status {status}, not 0")
        outcome.notes.append(f"ended after {time.monotonic() - started:.1f} s")
        bench.service.start()

    return bench.under_load("SIGTERM", disturb, may_fail=True)


def _connect(service: ServiceProcess, header: str) -> socket.socket:
    """A connection that has sent the header of a query to the model `good`."""
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=20)
    lines = ["POST /v1/models/good/infer HTTP/1.1", "Host: 127.0.0.1"]
    lines += ["Content-Type: application/octet-stream", header]
    connection.sendall("".join(f"{line}\r\n" for line in [*lines, ""]).encode())
    return connection


def _status(connection: socket.socket) -> str:
    try:
        return connection.recv(65536).split(b" ")[1].decode("ascii")
    except (OSError, IndexError):
        return "none"


def _send_slowly(bench: _Bench) -> Outcome:
    def disturb(outcome: Outcome) -> None:
        query = bench.query()
        with ExitStack() as stack:
            slow = []
            for _ in range(_SLOW_CLIENTS):
                length = f"Content-Length: {len(query)}"
                connection = stack.enter_context(_connect(bench.service, length))
                connection.sendall(query[: len(query) // 2])
                slow.append(connection)
            statuses = Counter(_status(connection) for connection in slow)
        outcome.notes.append(f"answers to {_SLOW_CLIENTS} slow clients: {dict(statuses)}")
        outcome.expect(statuses.keys() == {"408"}, "a slow client was not answered with 408")

    return bench.under_load("slow clients", disturb, may_fail=False)


def _send_too_much(bench: _Bench) -> Outcome:
    def disturb(outcome: Outcome) -> None:
        statuses: Counter[str] = Counter()
        query = bench.query()
        for _ in range(10):
            with _connect(bench.service, f"Content-Length: {2**40}") as connection:
                statuses[f"{_status(connection)} by its length"] += 1
            with _connect(bench.service, "Transfer-Encoding: chunked") as connection:
                # A byte too many, and a gigabyte still to come that nobody waits for.
                connection.sendall(f"{2**30:x}\r\n".encode() + query + b"x")
                statuses[f"{_status(connection)} as it comes"] += 1
        outcome.notes.append(f"answers to oversized bodies: {dict(statuses)}")
        outcome.expect(
            statuses.keys() == {"413 by its length", "422 as it comes"},
            "an oversized body was not refused at once",
        )

    return bench.under_load("oversized bodies", disturb, may_fail=False)


def _jump(bench: _Bench) -> Outcome:
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
    log = bench.work / "jump.log"
    with ServiceProcess(bench.store, log, environment={"PYTHONPATH": path}) as service:
        own = _Bench(bench.work, bench.store, bench.artifact, service, bench.seconds)
        return own.under_load("clock jump", disturb, may_fail=False)


def _corrupt(bench: _Bench) -> Outcome:
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
                with Client(service.url, name) as client:
                    client.logits(unit_rows(1, 32, 1))
            except VeilheadError as error:
                outcome.notes.append(f"{name}: {_kind(error)}")
            else:
                outcome.failures.append(f"{name} was answered")

    log = bench.work / "corrupt.log"
    with ServiceProcess(bench.work / "corrupt", log) as service:
        own = _Bench(bench.work, bench.store, bench.artifact, service, bench.seconds)
        outcome = own.under_load("corrupt store", disturb, may_fail=False)
    text = log.read_text("utf-8", "replace")
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


def _fill_disk(bench: _Bench) -> Outcome:
    """Store and state on a disk that is full: serving goes on, publishing fails and says so."""
    with _small_disk(bench.work) as (disk, reason):
        shutil.copytree(bench.store / "good", disk / "store" / "good")
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
            outcome.expect(service.status("/v1/models") == 200, "the list of models failed")

        log = bench.work / "disk.log"
        state = {"state_directory": disk / "state"}
        with ServiceProcess(disk / "store", log, settings=state) as service:
            own = _Bench(bench.work, bench.store, bench.artifact, service, bench.seconds)
            return own.under_load("full disk", disturb, may_fail=True)


_FAULTS: Final[tuple[Callable[[_Bench], Outcome], ...]] = (
    _kill_workers,
    _send_slowly,
    _send_too_much,
    _kill_service,
    _terminate,
    _corrupt,
    _fill_disk,
    _jump,
)


def run_chaos(*, seconds: float) -> list[Outcome]:
    """Every fault in turn, each under load of about so many seconds; prints a table."""
    console = wide_console()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="veilhead-chaos-") as name:
        work = Path(name)
        artifact = publish_random(work / "store", work, "good", _CLASSES, _DIMENSIONS)
        with ServiceProcess(
            work / "store", work / "service.log", settings={"body_seconds": _BODY_SECONDS}
        ) as service:
            bench = _Bench(work, work / "store", artifact, service, seconds)
            for fault in _FAULTS:
                outcomes.append(fault(bench))
                shown = "as promised" if outcomes[-1].passed else "FAILED"
                console.print(f"{outcomes[-1].fault}: {shown}", highlight=False)
    table = Table("fault", "calls", "right", "typed errors", "wrong", "lost", "remarks")
    for outcome in outcomes:
        table.add_row(
            outcome.fault,
            str(outcome.calls),
            str(outcome.right),
            ", ".join(f"{kind} {count}" for kind, count in sorted(outcome.errors.items())) or "0",
            str(outcome.wrong),
            str(outcome.lost),
            "; ".join([*(f"FAILED: {failure}" for failure in outcome.failures), *outcome.notes]),
        )
    console.print(table, markup=False)
    return outcomes
