"""Queries that the client encrypted once, with the keys that they carry, and loads made of them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import httpx2
import numpy as np
from numpy.typing import NDArray

from veilhead.session import EncryptedQuery, Session
from veilhead_benchmarks.processes import ServiceProcess
from veilhead_benchmarks.replay import READY, Caller, Outcome, Recorded, Stream
from veilhead_benchmarks.throughput import percentile
from veilhead_models.artifact import HeadArtifact
from veilhead_protocol.errors import WireError
from veilhead_protocol.wire import REPLY_HEADER_BYTES

#: A heavy tenant's own computing is not what others wait for.
HEAVY_NICENESS: Final = 19

#: Until every generator knows when to begin.
_AHEAD_SECONDS: Final = 0.1
_ENDS_SECONDS: Final = 120.0


@dataclass(frozen=True)
class Exchange:
    """A query with all that it takes to judge a reply to it."""

    artifact: HeadArtifact
    session: Session
    query: EncryptedQuery
    logits: NDArray[np.float64]  # [b, C]
    recorded: Recorded

    @classmethod
    def record(
        cls, service: ServiceProcess, artifact: HeadArtifact, rows: NDArray[np.float64], key: str
    ) -> Exchange:
        """Encrypt a query for embeddings [b, d], ask it once under this API key, check the reply.

        Raises:
            HTTPStatusError: when it is not answered.
            RuntimeError: when the reply is wrong.
        """
        session = Session(artifact.manifest)
        query = session.encrypt_batch(rows)
        path = f"/v1/models/{artifact.manifest.name}/infer"
        headers = {"Content-Type": "application/octet-stream", "Authorization": f"Bearer {key}"}
        reply = httpx2.post(
            service.url + path, content=query.data, headers=headers, trust_env=False, timeout=60
        )
        reply.raise_for_status()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{service.port}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        recorded = Recorded(
            f"{head}Content-Length: {len(query.data)}\r\n\r\n".encode() + query.data,
            reply.content[:REPLY_HEADER_BYTES],
            query.reply_bytes,
        )
        exchange = cls(artifact, session, query, artifact.logits(rows), recorded)
        if not exchange.is_right(reply.content):
            raise RuntimeError(f"the service answered wrongly for {artifact.manifest.name}")
        return exchange

    def is_right(self, reply: bytes) -> bool:
        """Whether a reply decrypts to the plaintext logits, within the model's error bound."""
        try:
            found = self.session.decrypt_batch(self.query, reply)
        except WireError:
            return False
        bound = self.artifact.manifest.head.error_bound
        return float(np.abs(found - self.logits).max()) <= bound


@dataclass(frozen=True)
class Voice:
    """A caller to be: a tenant's connections, and the exchanges that they replay."""

    tenant: str
    connections: int
    exchanges: tuple[Exchange, ...]


@dataclass(frozen=True)
class Side:
    """What came of the queries of one generator.

    Attributes:
        connections: at once.
        seconds: from the first query to the last answer.
        asked: queries, each counted once however often it was sent.
        answered: those that were answered.
        in_time: answers before new queries ended, by tenant: both sides have the same time.
        wrong: answers of another length, header or value than expected.
        lost: queries that were never answered, or with an error that is no refusal.
        refused: refusals, by code.
        broken: connections that ended within a query.
        checked: replies that were decrypted.
        p50_ms: of the answered, from the first sending to the end of the reply; None without any.
        p99_ms: the same for 99 % of them.
        generator_cores: CPU seconds a second of the generator.
    """

    connections: int
    seconds: float
    asked: int
    answered: int
    in_time: dict[str, int]
    wrong: int
    lost: int
    refused: dict[str, int]
    broken: int
    checked: int
    p50_ms: float | None
    p99_ms: float | None
    generator_cores: float

    @classmethod
    def of(cls, voices: Sequence[Voice], outcome: Outcome) -> Side:
        """Add an outcome up, and decrypt its samples."""
        tallies = outcome.tallies.values()
        false = sum(
            not voices[place].exchanges[number].is_right(reply)
            for place, number, reply in outcome.samples
        )
        latencies = [latency for tally in tallies for latency in tally.latencies]
        refused: Counter[str] = Counter()
        for tally in tallies:
            refused.update(tally.refused)
        return cls(
            connections=sum(voice.connections for voice in voices),
            seconds=round(outcome.seconds, 1),
            asked=sum(tally.asked for tally in tallies),
            answered=sum(tally.answered for tally in tallies) - false,
            in_time={name: tally.in_time for name, tally in outcome.tallies.items()},
            wrong=sum(tally.wrong for tally in tallies) + false,
            lost=sum(tally.abandoned + sum(tally.failed.values()) for tally in tallies),
            refused=dict(refused),
            broken=sum(tally.broken for tally in tallies),
            checked=len(outcome.samples),
            p50_ms=round(percentile(latencies, 50) * 1e3, 2) if latencies else None,
            p99_ms=round(percentile(latencies, 99) * 1e3, 2) if latencies else None,
            generator_cores=round(outcome.cpu_seconds / outcome.seconds, 3),
        )

    @property
    def refusals(self) -> str:
        """Its refusals in one line."""
        return ", ".join(f"{count} {code}" for code, count in self.refused.items()) or "none"


class Generator:
    """A process that replays some voices; as a context manager it ends with the block."""

    def __init__(self, voices: Sequence[Voice], stream: Stream) -> None:
        """Start it; the stream is made of these voices."""
        self._voices, self._stream = voices, stream
        self._process = subprocess.Popen(
            [sys.executable, "-m", "veilhead_benchmarks.replay"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def prepare(self) -> None:
        """Hand it what to send, and wait until it has read that.

        Raises:
            RuntimeError: when the generator failed.
        """
        self._write(self._stream.to_json())
        if self._process.stdout is None or self._process.stdout.readline() != READY:
            raise RuntimeError("a generator did not start")

    def begin(self, moment: float) -> None:
        """Let it send from then on, by `time.monotonic`."""
        self._write(repr(moment))

    def _write(self, line: str) -> None:
        if self._process.stdin is None:
            raise RuntimeError("a generator has no standard input")
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def side(self) -> Side:
        """What came of it, once it has ended.

        Raises:
            RuntimeError: when the generator failed.
        """
        output, _ = self._process.communicate(timeout=self._stream.seconds + _ENDS_SECONDS)
        if self._process.returncode:
            raise RuntimeError(f"a generator ended with status {self._process.returncode}")
        return Side.of(self._voices, Outcome.from_json(output))


def callers(voices: Sequence[Voice]) -> tuple[Caller, ...]:
    """What a generator needs of them."""
    return tuple(
        Caller(
            voice.tenant,
            voice.connections,
            tuple(exchange.recorded for exchange in voice.exchanges),
        )
        for voice in voices
    )


def put(
    service: ServiceProcess,
    light: Sequence[Voice],
    heavy: Sequence[Voice],
    seconds: float,
    *,
    polite: bool,
) -> tuple[Side, Side | None]:
    """Let both sides ask at the same time, each from a process of its own.

    Args:
        service: whom they ask.
        light: callers that honour `Retry-After`.
        heavy: callers of a generator that has the lowest priority; there may be none.
        seconds: how long new queries are sent.
        polite: whether the heavy ones honour `Retry-After`, too.
    """
    with ExitStack() as stack:
        streams = [(light, Stream(service.port, callers(light), seconds))]
        if heavy:
            stream = Stream(
                service.port, callers(heavy), seconds, polite=polite, niceness=HEAVY_NICENESS
            )
            streams.append((heavy, stream))
        generators = [stack.enter_context(Generator(*each)) for each in streams]
        for generator in generators:
            generator.prepare()
        begin = time.monotonic() + _AHEAD_SECONDS
        for generator in generators:
            generator.begin(begin)
        sides = [generator.side() for generator in generators]
    return sides[0], sides[1] if heavy else None
