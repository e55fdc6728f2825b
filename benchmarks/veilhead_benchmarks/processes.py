"""A service in a process of its own, that can be killed, and what its processes hold."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import httpx2
import numpy as np
from numpy.typing import NDArray

from veilhead_models.artifact import HeadArtifact
from veilhead_service.model_store import publish
from veilhead_service.state import State
from veilhead_service.tenants import DEFAULT_SCOPES, new_api_key

_START_SECONDS: Final = 60.0
_END_SECONDS: Final = 60.0


class ServiceProcess:
    """`veilhead-server run` on loopback; as a context manager it runs meanwhile.

    It has no tenants unless `settings` say so. It may be started again after its end: the port
    stays.
    """

    def __init__(
        self,
        store: Path,
        log: Path,
        *,
        workers: int = 2,
        settings: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        descriptors: tuple[int, int] | None = None,
    ) -> None:
        """Describe the service.

        Args:
            store: the store that it serves.
            log: the file that its standard error is added to.
            workers: evaluating processes.
            settings: of `Settings`, by name.
            environment: further variables.
            prefix: words before the command: a program that runs it.
            descriptors: soft and hard limit of open files; those of this process when None.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        self._command = [*prefix, sys.executable, "-m", "veilhead_service", "run"]
        self._command += ["--store", str(store), "--port", str(self.port)]
        self._command += ["--workers", str(workers)]
        if descriptors is not None:
            limits = "ulimit -Sn {}; ulimit -Hn {}".format(*descriptors)
            self._command = ["/bin/sh", "-c", f'{limits}; exec "$@"', "run", *self._command]
        self.state_directory: Path = log.parent / "state"
        given = {"insecure_no_tenants": True, "state_directory": self.state_directory}
        self._environment = os.environ | {
            f"VEILHEAD_SERVER_{name.upper()}": str(value)
            for name, value in {**given, **(settings or {})}.items()
        }
        self._environment.update(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """The service's own process."""
        if self._process is None:
            raise RuntimeError("the service was not started")
        return self._process.pid

    def start(self, *, until: str = "/readyz") -> None:
        """Start the service and wait until it is ready, or until another path is answered.

        Raises:
            RuntimeError: when it does not come up; its log says why.
        """
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603
                self._command, env=self._environment, stderr=log, stdout=log
            )
        deadline = time.monotonic() + _START_SECONDS
        while self.status(until) != 200:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the service did not come up; {self._log} says why")
            time.sleep(0.05)

    def status(self, path: str) -> int | None:
        """The status of a GET; None when nothing answers."""
        try:
            return httpx2.get(self.url + path, trust_env=False, timeout=10).status_code
        except httpx2.TransportError:
            return None

    def kill(self) -> None:
        """End the service as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def terminate(self) -> int:
        """Send SIGTERM and wait for the end; the exit status."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """The exit status, once the process has ended."""
        if self._process is None:
            raise RuntimeError("the service was not started")
        return self._process.wait(_END_SECONDS)

    def workers(self) -> list[int]:
        """The evaluating processes that run now."""
        return [pid for pid in _children(self.pid) if is_running(pid)]

    def resident_bytes(self) -> int:
        """Resident memory of the service and its workers, proc(5)."""
        return sum(resident_bytes(pid) for pid in [self.pid, *self.workers()])

    def descriptors(self) -> int:
        """Open files of the service and its workers, proc(5)."""
        return sum(_descriptors(pid) for pid in [self.pid, *self.workers()])


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    return _state(pid)[0] != "Z"


def _state(pid: int) -> tuple[str, int]:
    """A process's state and its parent; ("Z", 0) when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except OSError:
        return "Z", 0
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, int(parent)


def _children(parent: int) -> list[int]:
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if _state(pid)[1] == parent]


def resident_bytes(pid: int) -> int:
    """Resident memory of one process, proc(5); 0 when it is gone."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * resource.getpagesize()


def _descriptors(pid: int) -> int:
    """Open files of one process, proc(5); 0 when it is gone."""
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return 0


def publish_random(
    store: Path, work: Path, name: str, classes: int, dimensions: int, parameters: str = "standard"
) -> HeadArtifact:
    """Publish a head of random weights, of the size that trained ones have."""
    generator = np.random.default_rng(classes)
    artifact = HeadArtifact.from_weights(
        generator.normal(scale=0.5, size=(classes, dimensions)),
        generator.normal(size=classes),
        [f"label {index}" for index in range(classes)],
        name=name,
        parameters=parameters,
    )
    artifact.save(work / "artifacts" / name)
    publish(work / "artifacts" / name, store)
    return artifact


def add_tenants(state_directory: Path, count: int) -> list[str]:
    """API keys of so many new tenants."""
    written = []
    with State(state_directory) as state:
        for number in range(count):
            key, api_key = new_api_key(
                f"tenant-{number}", DEFAULT_SCOPES, now=time.time(), expires=None
            )
            state.add_tenant(key)
            written.append(api_key)
    return written


def unit_rows(rows: int, dimensions: int, seed: int) -> NDArray[np.float64]:
    """Random embeddings [rows, dimensions] of norm one."""
    embeddings = np.random.default_rng(seed).normal(size=(rows, dimensions))
    unit: NDArray[np.float64] = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return unit
