"""How many texts a second the service answers over HTTP, and how long each waits.

The service runs as its own processes on loopback, the load comes from another one
(`load_generator.py`). Queries are encrypted before the clock starts and sent again and again:
the service does the same work for them, since it keeps nothing of a query. Of every load some
replies are decrypted and compared with the plaintext logits.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import httpx2
import numpy as np
from numpy.typing import NDArray

from veilhead.session import EncryptedQuery, Session
from veilhead_benchmarks.load_generator import Load, Outcome
from veilhead_benchmarks.processes import ServiceProcess, publish_random, unit_rows
from veilhead_models.artifact import HeadArtifact

_DIMENSIONS: Final = 384
_PARAMETERS: Final = "standard"
_SEED: Final = 1

#: Clients, each with a key of its own, and queries of each.
_CLIENTS: Final = 8
_QUERIES: Final = 4

#: Enough that a worker always finds a query waiting; more would only wait longer.
_CLOSED_CONNECTIONS: Final = 8
#: Fewer than may wait in the service. When all are busy the next request is late, which counts.
_OPEN_CONNECTIONS: Final = 32

_ENDS_SECONDS: Final = 120.0


@dataclass(frozen=True)
class Loads:
    """What is put on the service of one head.

    Attributes:
        classes: of the head.
        closed_seconds: how long it is saturated, with one worker and with two.
        open_seconds: how long texts arrive at each of the open rates.
        shares: those rates, as shares of what one worker did when saturated.
        two_workers: whether two are measured; for few classes the service's own process is the
            limit, and a second worker has nothing to do.
    """

    classes: int
    closed_seconds: float = 8.0
    open_seconds: float = 12.0
    shares: tuple[float, ...] = (0.5, 0.8)
    two_workers: bool = True


@dataclass(frozen=True)
class Throughput:
    """One measured load; None where it does not apply.

    Attributes:
        parameters: parameter set.
        d: dimensions of an embedding.
        classes: classes of the head.
        workers: evaluating processes of the service.
        load: `closed`: every connection sends again once it has its reply, which saturates the
            service; `open`: Poisson arrivals, whatever the service does.
        connections: requests on their way at once, at most.
        offered_per_second: rate of the arrivals of an open load.
        seconds: from the start to the last reply.
        texts: replies, one text each.
        texts_per_second: over `seconds`.
        texts_per_worker_core: texts for each second of CPU that workers used.
        two_against_one: texts a second, divided by those of one worker; with two only.
        p50_ms: latency of an open load, from when a request was to be sent to the end of its
            reply: half of the requests took at most so long.
        p95_ms: the same for 95 % of the requests.
        p99_ms: the same for 99 % of them.
        generator_cores: CPU seconds a second of the load generator.
        service_cores: of the service's own process.
        worker_cores: of its workers, added up.
        checked: replies that were decrypted.
        max_error: their largest distance from the plaintext logits.
    """

    parameters: str
    d: int
    classes: int
    workers: int
    load: Literal["closed", "open"]
    connections: int
    offered_per_second: float | None
    seconds: float
    texts: int
    texts_per_second: float
    texts_per_worker_core: float
    two_against_one: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    generator_cores: float
    service_cores: float
    worker_cores: float
    checked: int
    max_error: float


@dataclass(frozen=True)
class Queries:
    """Encrypted queries of several clients for one head, with the plaintext logits."""

    artifact: HeadArtifact
    sessions: tuple[Session, ...]
    encrypted: tuple[EncryptedQuery, ...]
    logits: NDArray[np.float64]  # [queries, C]

    @classmethod
    def encrypt(cls, artifact: HeadArtifact) -> Queries:
        """Make them, before any clock starts."""
        rows = unit_rows(_CLIENTS * _QUERIES, artifact.manifest.head.dimensions, _SEED)
        sessions = tuple(Session(artifact.manifest) for _ in range(_CLIENTS))
        return cls(
            artifact,
            sessions,
            tuple(sessions[index % _CLIENTS].encrypt(row) for index, row in enumerate(rows)),
            artifact.logits(rows),
        )

    @property
    def requests(self) -> tuple[bytes, ...]:
        """Whole HTTP requests."""
        head = (
            f"POST /v1/models/{self.artifact.manifest.name}/infer HTTP/1.1\r\n"
            "Host: 127.0.0.1\r\nContent-Type: application/octet-stream\r\n"
        )
        return tuple(
            f"{head}Content-Length: {len(query.data)}\r\n\r\n".encode() + query.data
            for query in self.encrypted
        )

    def register_keys(self, url: str) -> None:
        """Make the clients' keys known to a service."""
        for key in {query.key for query in self.encrypted}:
            httpx2.put(
                f"{url}/v1/keys/{key.id.hex()}",
                content=key.message,
                headers={"Content-Type": "application/octet-stream"},
                trust_env=False,
            ).raise_for_status()

    def max_error(self, replies: dict[int, bytes]) -> float:
        """The largest distance of these replies, by the query's index, from the plaintext logits.

        Raises:
            WireError: one of its kinds, when a reply is none, or is one to another query.
            RuntimeError: when the distance is above the model's error bound.
        """
        errors = [
            np.abs(
                self.sessions[index % _CLIENTS].decrypt(self.encrypted[index], reply)
                - self.logits[index]
            ).max()
            for index, reply in replies.items()
        ]
        largest, bound = float(max(errors)), self.artifact.manifest.head.error_bound
        if not largest <= bound:
            raise RuntimeError(f"a reply is wrong by {largest:.3g}, expected at most {bound:.3g}")
        return largest


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest of the values that at least so many per cent of them do not exceed."""
    return sorted(values)[math.ceil(percent * len(values) / 100) - 1]


def poisson_arrivals(rate: float, seconds: float, seed: int) -> tuple[float, ...]:
    """Times of independent arrivals, `rate` of them a second on average; at least one."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, math.ceil(rate * seconds))
    return tuple(np.cumsum(gaps).tolist())


def _generate(load: Load) -> Outcome:
    """The load's outcome, from a process of its own."""
    output = subprocess.run(
        [sys.executable, "-m", "veilhead_benchmarks.load_generator"],
        input=load.to_json(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=_ENDS_SECONDS + load.seconds,
    ).stdout
    return Outcome.from_json(output)


def _measure(
    service: ServiceProcess,
    queries: Queries,
    loads: Loads,
    *,
    offered: float | None = None,
    one: Throughput | None = None,
) -> Throughput:
    """Saturate the service, or offer it so many texts a second; `one`: what one worker did."""
    workers = tuple(service.workers())
    manifest = queries.artifact.manifest
    connections = _CLOSED_CONNECTIONS * len(workers) if offered is None else _OPEN_CONNECTIONS
    arrivals = None if offered is None else poisson_arrivals(offered, loads.open_seconds, _SEED)
    outcome = _generate(
        Load(
            port=service.port,
            requests=queries.requests,
            reply_bytes=queries.sessions[0].reply_bytes,
            connections=connections,
            seconds=loads.closed_seconds,
            arrivals=arrivals,
            service=service.pid,
            workers=workers,
        )
    )
    texts = len(outcome.latencies)
    rate = texts / outcome.seconds

    def latency_ms(percent: int) -> float | None:
        # Closed, it says only how many connections there were.
        return None if offered is None else percentile(outcome.latencies, percent) * 1e3

    return Throughput(
        parameters=manifest.parameter_set.name,
        d=manifest.head.dimensions,
        classes=queries.logits.shape[1],
        workers=len(workers),
        load="closed" if offered is None else "open",
        connections=connections,
        offered_per_second=offered,
        seconds=outcome.seconds,
        texts=texts,
        texts_per_second=rate,
        texts_per_worker_core=texts / outcome.worker_cpu if outcome.worker_cpu else math.inf,
        two_against_one=None if one is None else rate / one.texts_per_second,
        p50_ms=latency_ms(50),
        p95_ms=latency_ms(95),
        p99_ms=latency_ms(99),
        generator_cores=outcome.generator_cpu / outcome.seconds,
        service_cores=outcome.service_cpu / outcome.seconds,
        worker_cores=outcome.worker_cpu / outcome.seconds,
        checked=len(outcome.replies),
        max_error=queries.max_error(outcome.replies),
    )


def measure_throughput(loads: Loads) -> list[Throughput]:
    """Measure one head: saturated, with two workers, and at rates below that.

    Raises:
        RuntimeError: when a reply is wrong.
        subprocess.CalledProcessError: when a query was not answered.
    """
    with tempfile.TemporaryDirectory(prefix="veilhead-throughput-") as name:
        work = Path(name)
        artifact = publish_random(
            work / "store", work, "benchmark", loads.classes, _DIMENSIONS, _PARAMETERS
        )
        queries = Queries.encrypt(artifact)
        # Each has a state of its own, and both run meanwhile: what is compared is measured in turn,
        # before the machine changes much.
        for number in ("one", "two"):
            (work / number).mkdir()
        log = "service.log"
        with ServiceProcess(work / "store", work / "one" / log, workers=1) as service:
            queries.register_keys(service.url)
            saturated = _measure(service, queries, loads)
            rows = [saturated]
            if loads.two_workers:
                with ServiceProcess(work / "store", work / "two" / log, workers=2) as other:
                    queries.register_keys(other.url)
                    rows.append(_measure(other, queries, loads, one=saturated))
            rows += [
                _measure(service, queries, loads, offered=share * saturated.texts_per_second)
                for share in loads.shares
            ]
    return rows
