"""Load for the trials of faults: clients of several tenants, and what they and their bills saw.

Every call must either return logits within the model's error bound or raise one typed error; none
may hang, be lost or be wrong. Every answer is charged once and recorded. A tenant that was revoked
before the load asks all the time, too, and must never be let in.
"""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx2
import numpy as np

from veilhead import BatchError, Client, ServiceResponseError, VeilheadError
from veilhead.session import Session
from veilhead_benchmarks.processes import ServiceProcess, add_tenants, unit_rows
from veilhead_models.artifact import HeadArtifact
from veilhead_service.access_log_chain import FILE_NAME
from veilhead_service.limits import Budget, Period
from veilhead_service.state import State
from veilhead_service.state_file import STATE_FILE

CLASSES: Final = 10
DIMENSIONS: Final = 384
CLIENTS: Final = 4
MODEL: Final = "good"

#: A call that has not ended so long after the load is lost.
_LOST_SECONDS: Final = 90.0

#: Attempts of the SDK: so often a query may have been charged whose call failed.
_ATTEMPTS: Final = 5

_BUDGET: Final = 10**9


@dataclass
class Outcome:
    """What callers saw during one fault.

    Attributes:
        fault: what was done to the service.
        may_fail: whether typed errors are allowed while it happens.
        calls: calls that began.
        right: calls that returned logits within the error bound.
        errors: typed errors, by code or by the service's problem.
        charged: units that were charged; None where the state forgot them.
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
    charged: int | None = None
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


def kind_of(error: VeilheadError) -> str:
    """The code of an error, or of the service's problem."""
    if isinstance(error, BatchError):
        return kind_of(error.errors[min(error.errors)])
    return error.problem or error.code if isinstance(error, ServiceResponseError) else error.code


class Load:
    """Clients that ask without pause, each on a thread of its own."""

    def __init__(
        self, outcome: Outcome, artifact: HeadArtifact, url: str, api_keys: Sequence[str]
    ) -> None:
        self._outcome = outcome
        self._artifact = artifact
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._stack = ExitStack()
        self._clients = [
            self._stack.enter_context(Client(url, artifact.manifest.name, api_key=api_key))
            for api_key in api_keys
        ]
        self._threads = [
            threading.Thread(target=self._run, args=(client, seed), daemon=True)
            for seed, client in enumerate(self._clients)
        ]

    def start(self) -> None:
        """Begin to ask."""
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
        rows = unit_rows(1, DIMENSIONS, generator.randrange(2**30))  # one query, one unit
        with self._lock:
            self._outcome.calls += 1
        try:
            logits = client.logits(rows)
        except VeilheadError as error:
            with self._lock:
                self._outcome.errors[kind_of(error)] += 1
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


class Stranger:
    """Asks with an API key that was revoked, without pause."""

    def __init__(self, url: str, api_key: str) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.answers: Counter[str] = Counter()

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def finish(self) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join(_LOST_SECONDS)

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            try:
                answer = httpx2.get(
                    f"{self._url}/v1/models", headers=self._headers, trust_env=False, timeout=20
                )
            except httpx2.TransportError:
                continue
            self.answers[str(answer.status_code)] += 1


@dataclass(frozen=True)
class Tenants:
    """Tenants in the state of a service, one of them revoked.

    Attributes:
        state: the state directory.
        api_keys: of those who may ask, one for each client of the load.
        revoked: the API key of who may not.
        backup: the state as it was before the revocation.
    """

    state: Path
    api_keys: tuple[str, ...]
    revoked: str
    backup: Path

    @classmethod
    def made_in(cls, state: Path) -> Tenants:
        """Two tenants with budgets, each with half of the clients, and one that is revoked."""
        *good, revoked = add_tenants(state, 3)
        with State(state) as opened:
            for name in ("tenant-0", "tenant-1"):
                opened.set_budget(name, MODEL, Budget(_BUDGET, Period.DAY))
        backup = state.with_name(f"{state.name}-backup.sqlite3")
        source, target = sqlite3.connect(state / STATE_FILE), sqlite3.connect(backup)
        with closing(source), closing(target):
            source.backup(target)
        made = cls(state, tuple(good[number % 2] for number in range(CLIENTS)), revoked, backup)
        made.command("revoke", "tenant-2")
        return made

    def command(self, *arguments: str) -> str:
        """What `veilhead-server tenants` prints; its failure is ours."""
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "veilhead_service", "tenants", *arguments,
             "--state", str(self.state)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"tenants {arguments[0]} failed: {done.stderr.strip()}")
        return done.stdout

    def settings(self) -> dict[str, object]:
        """Of a service with these tenants, which answers nothing that it could not record."""
        return {
            "insecure_no_tenants": False,
            "state_directory": self.state,
            "access_log": "required",
        }

    def used(self) -> int:
        """Units that were charged in all."""
        uri = f"{(self.state / STATE_FILE).absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as database:
            return int(database.execute("SELECT coalesce(sum(used), 0) FROM usage").fetchone()[0])

    def recorded(self) -> int:
        """Answers to queries that the access log holds."""
        found = 0
        for file in self.state.glob(f"{FILE_NAME}*"):
            for line in file.read_bytes().splitlines():
                if b'"route":"/v1/models/{name}/infer"' in line and b'"status":200' in line:
                    found += json.loads(line)["status"] == 200
        return found

    def verify_log(self, files: Sequence[Path] = ()) -> str:
        """What is wrong with the access log, or nothing."""
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "veilhead_service", "access-log", "verify",
             *map(str, files or [self.state / FILE_NAME])],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stderr.strip() if done.returncode else ""

    def restore(self) -> None:
        """Put the backup in the place of the state, as docs/operations/tenants.md says."""
        shutil.copyfile(self.backup, self.state / STATE_FILE)
        for end in ("-wal", "-shm"):
            (self.state / f"{STATE_FILE}{end}").unlink(missing_ok=True)


@dataclass(frozen=True)
class Bench:
    """A service, its store and tenants, and the model that is asked."""

    work: Path
    store: Path
    artifact: HeadArtifact
    service: ServiceProcess
    tenants: Tenants
    seconds: float

    @contextmanager
    def another(
        self,
        name: str,
        *,
        store: Path | None = None,
        state: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Iterator[Bench]:
        """A bench like this one, with a service, a state and tenants of its own."""
        tenants = Tenants.made_in(state or self.work / f"{name}-state")
        place = store or self.store
        with ServiceProcess(
            place,
            self.work / f"{name}.log",
            settings=tenants.settings(),
            environment=environment,
        ) as service:
            yield Bench(self.work, place, self.artifact, service, tenants, self.seconds)

    def query(self) -> bytes:
        """A query that the service takes; any other is refused at its header."""
        row = unit_rows(1, DIMENSIONS, 0)[0]
        return Session(self.artifact.manifest).encrypt(row).data

    def under_load(
        self,
        fault: str,
        disturb: Callable[[Outcome], None],
        *,
        may_fail: bool,
        losses: int = 0,
        forgets: bool = False,
    ) -> Outcome:
        """Load, the fault in its middle, and what the callers and their bills saw.

        Args:
            fault: its name.
            disturb: does it, and undoes it.
            may_fail: whether typed errors are allowed.
            losses: how often the service is killed, or cannot record what it answers: each time
                the queries under way may have been charged, and their replies lost.
            forgets: the state is one of before the load in the end, so nothing can be counted.
        """
        outcome = Outcome(fault, may_fail)
        used, recorded = self.tenants.used(), self.tenants.recorded()
        load = Load(outcome, self.artifact, self.service.url, self.tenants.api_keys)
        stranger = Stranger(self.service.url, self.tenants.revoked)
        load.start()
        stranger.start()
        time.sleep(self.seconds / 3)
        disturb(outcome)
        time.sleep(self.seconds / 3)
        outcome.expect(self.service.status("/livez") == 200, "/livez did not answer")
        load.finish()
        stranger.finish()
        outcome.expect("200" not in stranger.answers, "who was revoked was let in")
        outcome.expect("401" in stranger.answers, "who was revoked was never refused")
        if not forgets:
            used, recorded = self.tenants.used() - used, self.tenants.recorded() - recorded
            self._check_bills(outcome, used, recorded, losses)
        return outcome

    def _check_bills(self, outcome: Outcome, used: int, recorded: int, losses: int) -> None:
        lost = CLIENTS * losses + _ATTEMPTS * outcome.errors.total()
        outcome.charged = used
        outcome.expect(
            outcome.right <= recorded, f"{outcome.right} answers came, {recorded} are recorded"
        )
        outcome.expect(
            recorded <= used <= recorded + lost,
            f"{recorded} answers are recorded, {used} were charged, {lost} may have been lost",
        )
