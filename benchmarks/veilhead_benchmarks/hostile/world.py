"""A service in processes of its own, with models and tenants, and what it holds."""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np

from veilhead.session import EncryptedQuery, Session
from veilhead_benchmarks.hostile.wire import Answer, Connection, NoAnswerError, Request
from veilhead_benchmarks.processes import ServiceProcess, publish_random, unit_rows
from veilhead_models.artifact import HeadArtifact
from veilhead_protocol.files import describe_file
from veilhead_protocol.manifest import BackboneSection
from veilhead_service.model_store import publish, retire
from veilhead_service.retirement import Retirement
from veilhead_service.routes import MESSAGE_TYPE
from veilhead_service.state import State
from veilhead_service.tenants import DEFAULT_SCOPES, KeyScope, new_api_key

#: How long the service waits for a header, and for a body; few requests make it wait.
BODY_SECONDS: Final = 1.0

#: How long it waits for a peer that takes nothing of its answers.
UNREAD_SECONDS: Final = 1.0

#: Connections that it may have, and from one address.
CONNECTIONS: Final = 96
PEER_CONNECTIONS: Final = 64

#: The operator's probe comes from here.
_PROBE_ADDRESS: Final = "127.0.0.9"
_PROBE_PAUSE_SECONDS: Final = 0.1

_KEY_SECONDS: Final = 86_400.0
_MUCH: Final = 1_000_000

#: name: (classes, dimensions, parameter set)
MODELS: Final = {
    "digits": (10, 64, "standard"),
    "chapters": (22, 384, "standard"),
    "compact": (5, 384, "compact"),
    "long": (4, 3000, "standard"),  # several query polynomials
}
WITH_FILES: Final = "text"
RETIRED: Final = "retired"


@dataclass(frozen=True)
class Caller:
    """A tenant: its API key, and a good query for each model under a registered key."""

    name: str
    written: str
    scopes: frozenset[KeyScope]
    sessions: dict[str, Session] = field(default_factory=dict)
    queries: dict[str, EncryptedQuery] = field(default_factory=dict)

    @property
    def key_ids(self) -> set[str]:
        """Ids of the keys that it has registered."""
        return {query.key.id.hex() for query in self.queries.values()}

    @property
    def authorization(self) -> tuple[bytes, bytes]:
        """The header that names it."""
        return b"authorization", f"Bearer {self.written}".encode()


@dataclass(frozen=True)
class Held:
    """What a service holds at one moment.

    Attributes:
        resident_bytes: of its process and its workers.
        descriptors: open files of its process.
        disk_bytes: of its state, its access log and its log.
    """

    resident_bytes: int
    descriptors: int
    disk_bytes: int


class Probe:
    """Asks for /livez all the while, and counts."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.answered = 0
        self.slowest_seconds = 0.0
        self.failures: list[str] = []

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        request = Request("GET", "/livez", headers=((b"connection", b"close"),))
        while not self._stop.wait(_PROBE_PAUSE_SECONDS):
            started = time.monotonic()
            try:
                with Connection(self._port, address=_PROBE_ADDRESS) as connection:
                    connection.send_request(request)
                    status = connection.read().status
            except (OSError, NoAnswerError) as error:
                self.failures.append(str(error) or type(error).__name__)
                continue
            self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - started)
            self.answered += status == 200
            if status != 200:
                self.failures.append(f"status {status}")


@dataclass
class World:
    """A running service, its models and its tenants."""

    service: ServiceProcess
    log: Path
    artifacts: dict[str, HeadArtifact]
    callers: tuple[Caller, ...]
    probe: Probe
    lingering: list[tuple[int, str, float, Connection]] = field(default_factory=list)
    _kept: Connection | None = None

    @property
    def tenants(self) -> tuple[Caller, ...]:
        """The callers that may ask queries."""
        return tuple(caller for caller in self.callers if caller.queries)

    def ask(self, request: Request) -> Answer:
        """The answer to a request that breaks no connection."""
        connection = self._kept or Connection(self.service.port)
        self._kept = None
        connection.send_request(request)
        try:
            answer = connection.read(to_head=request.method == "HEAD")
        except NoAnswerError:  # it was idle for long, and ended meanwhile
            connection.close()
            connection = Connection(self.service.port)
            connection.send_request(request)
            answer = connection.read(to_head=request.method == "HEAD")
        if answer.headers.get("connection") == "close":
            connection.close()
        else:
            self._kept = connection
        return answer

    def held(self) -> Held:
        """What the service holds now."""
        files = [path for path in self.service.state_directory.rglob("*") if path.is_file()]
        return Held(
            self.service.resident_bytes(),
            len(list(Path(f"/proc/{self.service.pid}/fd").iterdir())),
            sum(path.stat().st_size for path in [*files, self.log]),
        )

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        (operator,) = (caller for caller in self.callers if KeyScope.METRICS in caller.scopes)
        text = self.ask(Request("GET", "/metrics", headers=(operator.authorization,))).body.decode()
        found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    def settle(self, before: Held) -> Held:
        """What the service holds once connections have ended, or stay for good."""
        deadline = time.monotonic() + 10 * max(UNREAD_SECONDS, BODY_SECONDS)
        now = self.held()
        while now.descriptors > before.descriptors and time.monotonic() < deadline:
            time.sleep(0.2)
            now = self.held()
        return now

    def close(self) -> None:
        """End what the client holds open."""
        for _, _, _, connection in self.lingering:
            connection.close()
        if self._kept is not None:
            self._kept.close()


def put(caller: Caller, message: bytes) -> Request:
    """The request that registers a key message."""
    target = f"/v1/keys/{hashlib.sha256(message).hexdigest()}"
    headers = (caller.authorization, (b"content-type", MESSAGE_TYPE.encode()))
    return Request("PUT", target, b"", headers, (message,))


def register(world: World, caller: Caller) -> None:
    """Register the keys of a caller's good queries."""
    for query in caller.queries.values():
        world.ask(put(caller, query.key.message))


def _publish_all(work: Path) -> dict[str, HeadArtifact]:
    artifacts = {
        name: publish_random(work / "store", work, name, classes, dimensions, parameters)
        for name, (classes, dimensions, parameters) in MODELS.items()
    }
    files = work / "backbone"
    files.mkdir()
    (files / "config.json").write_text('{"hidden_size": 8}', "ascii")
    (files / "model.safetensors").write_bytes(bytes(range(256)) * 20)
    (files / "empty.txt").write_bytes(b"")
    section = BackboneSection(
        kind="transformers",
        name="toy",
        pooling="mean",
        normalise=True,
        max_tokens=16,
        public_parameters=1000,
        files=tuple(describe_file(files, path.name) for path in sorted(files.iterdir())),
    )
    head = HeadArtifact.from_weights(
        np.eye(3, 8), np.zeros(3), ["first", "second", "third"], name=WITH_FILES
    ).with_backbone(files, section)
    head.save(work / "artifacts" / WITH_FILES)
    publish(work / "artifacts" / WITH_FILES, work / "store")
    publish_random(work / "store", work, RETIRED, 3, 64)
    retire(work / "store", RETIRED, None, Retirement(datetime(2020, 1, 1, tzinfo=UTC)))
    return artifacts


def _add_caller(state: State, name: str, scopes: frozenset[KeyScope]) -> Caller:
    key, written = new_api_key(name, scopes, now=time.time(), expires=None)
    state.add_tenant(key)
    return Caller(name, written, scopes)


def _encrypt_all(caller: Caller, artifacts: dict[str, HeadArtifact]) -> None:
    for name, artifact in artifacts.items():
        session = Session(artifact.manifest)
        caller.sessions[name] = session
        caller.queries[name] = session.encrypt(unit_rows(1, artifact.weight.shape[1], 1)[0])


@contextmanager
def running(work: Path, environment: Mapping[str, str]) -> Iterator[World]:
    """A service that runs, with everything registered, in an empty directory."""
    artifacts = _publish_all(work)
    with State(work / "state") as state:
        callers = (
            _add_caller(state, "first-hospital", DEFAULT_SCOPES),
            _add_caller(state, "second-insurer", DEFAULT_SCOPES),
            _add_caller(state, "usage-only", frozenset({KeyScope.USAGE})),
            _add_caller(state, "the-operator", frozenset({KeyScope.METRICS})),
        )
    for caller in callers[:2]:
        _encrypt_all(caller, artifacts)
    settings = {
        "insecure_no_tenants": False,
        "state_directory": work / "state",
        "body_seconds": BODY_SECONDS,
        "unread_seconds": UNREAD_SECONDS,
        "max_connections": CONNECTIONS,
        "peer_connections": PEER_CONNECTIONS,
        # Requests come one after the other, and faster than anybody sends them.
        "rate_per_second": _MUCH,
        "rate_burst": _MUCH,
        "refusals_per_second": _MUCH,
        "key_idle_seconds": _KEY_SECONDS,
        "key_lifetime_seconds": _KEY_SECONDS,
    }
    log = work / "log"
    service = ServiceProcess(
        work / "store", log, workers=2, settings=settings, environment=environment
    )
    with service:
        world = World(service, log, artifacts, callers, Probe(service.port))
        for caller in world.tenants:
            register(world, caller)
        world.probe.start()
        try:
            yield world
        finally:
            world.probe.stop()
            world.close()
    shutil.rmtree(work / "store")
