"""One load on a running service: `python -m veilhead_benchmarks.load_generator`.

A process of its own, which reads a `Load` as JSON from standard input and prints its `Outcome` as
JSON. Its client is a minimal one, on connections that stay open: requests are sent as the bytes
that they came as, and of an answer only the status and the length are looked at. Everything else
would take CPU from the service on the same machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import selectors
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Final

_WARM_UP_SECONDS: Final = 0.5
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *([0-9]{1,9})\r\n", re.IGNORECASE)
_MAX_HEAD_BYTES: Final = 2**20


@dataclass(frozen=True)
class Load:
    """What to send.

    Attributes:
        port: of loopback, where the service listens.
        requests: whole HTTP requests, sent in turn.
        reply_bytes: the length that every reply must have.
        connections: requests that are on their way at once, at most.
        seconds: how long to go on, with each connection sending again as soon as it has a reply.
        arrivals: instead of that, the seconds after the start at which requests are to be sent.
        service: process of the service.
        workers: its evaluating processes.
    """

    port: int
    requests: tuple[bytes, ...]
    reply_bytes: int
    connections: int
    seconds: float
    arrivals: tuple[float, ...] | None
    service: int
    workers: tuple[int, ...]

    def to_json(self) -> str:
        """The text that `from_json` reads."""
        texts = [b64encode(request).decode() for request in self.requests]
        return json.dumps(vars(self) | {"requests": texts})

    @classmethod
    def from_json(cls, text: str) -> Load:
        """The load that a text describes."""
        fields = json.loads(text)
        fields["requests"] = tuple(map(b64decode, fields["requests"]))
        fields["workers"] = tuple(fields["workers"])
        if fields["arrivals"] is not None:
            fields["arrivals"] = tuple(fields["arrivals"])
        return cls(**fields)


@dataclass(frozen=True)
class Outcome:
    """What came of a load.

    Attributes:
        seconds: from the start to the last reply.
        latencies: seconds from when each request was to be sent to the end of its reply.
        replies: the last reply to each request, by the request's index.
        generator_cpu: seconds of CPU that this process used meanwhile.
        service_cpu: the service's own.
        worker_cpu: those of its evaluating processes, added up.
    """

    seconds: float
    latencies: tuple[float, ...]
    replies: dict[int, bytes]
    generator_cpu: float
    service_cpu: float
    worker_cpu: float

    def to_json(self) -> str:
        """The text that `from_json` reads."""
        texts = {index: b64encode(reply).decode() for index, reply in self.replies.items()}
        return json.dumps(vars(self) | {"replies": texts})

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        """The outcome that a text describes."""
        fields = json.loads(text)
        replies = {int(index): b64decode(reply) for index, reply in fields["replies"].items()}
        latencies = tuple(fields["latencies"])
        return cls(**(fields | {"replies": replies, "latencies": latencies}))


class _Connection:
    """One connection that stays open."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, reply_bytes: int
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._reply_bytes = reply_bytes

    async def ask(self, request: bytes) -> bytes:
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        # A refusal is faster than a reply: counting it would flatter the service.
        if not head.startswith(b"HTTP/1.1 200 ") or length is None:
            raise RuntimeError(f"expected a reply, the service answered {head[:80]!r}")
        if int(length[1]) != self._reply_bytes:
            raise RuntimeError(
                f"a reply has {int(length[1])} bytes, expected {self._reply_bytes} for this model"
            )
        return await self._reader.readexactly(self._reply_bytes)

    def close(self) -> None:
        self._writer.close()


async def _send(
    load: Load, connections: list[_Connection], dues: Iterator[float | None], started: float
) -> tuple[list[float], dict[int, bytes]]:
    """Send on all connections until `dues` ends; latencies, and the last reply to each request."""
    numbers = count()
    latencies: list[float] = []
    replies: dict[int, bytes] = {}

    async def run(connection: _Connection) -> None:
        for due in dues:  # shared: each takes the next one when it is free
            intended = time.perf_counter() if due is None else started + due
            await asyncio.sleep(max(0.0, intended - time.perf_counter()))
            index = next(numbers) % len(load.requests)
            replies[index] = await connection.ask(load.requests[index])
            latencies.append(time.perf_counter() - intended)

    async with asyncio.TaskGroup() as group:
        for connection in connections:
            group.create_task(run(connection))
    return latencies, replies


def _until(end: float) -> Iterator[None]:
    """A request at once, again and again until then."""
    return (None for _ in takewhile(lambda _: time.perf_counter() < end, count()))


def cpu_seconds(pids: tuple[int, ...]) -> float:
    """User and system time of processes, proc(5)."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def generate(load: Load) -> Outcome:
    """Put the load on the service, after a short warm-up.

    Raises:
        RuntimeError: in a group, when an answer is anything but a reply of the right length.
    """
    connections: list[_Connection] = []
    try:
        for _ in range(load.connections):
            streams = await asyncio.open_connection("127.0.0.1", load.port, limit=_MAX_HEAD_BYTES)
            connections.append(_Connection(*streams, load.reply_bytes))
        await _send(load, connections, _until(time.perf_counter() + _WARM_UP_SECONDS), 0.0)
        return await _measured(load, connections)
    finally:
        for connection in connections:
            connection.close()


async def _measured(load: Load, connections: list[_Connection]) -> Outcome:
    service, workers = cpu_seconds((load.service,)), cpu_seconds(load.workers)
    own, started = time.process_time(), time.perf_counter()
    dues: Iterator[float | None]
    dues = _until(started + load.seconds) if load.arrivals is None else iter(load.arrivals)
    latencies, replies = await _send(load, connections, dues, started)
    return Outcome(
        seconds=time.perf_counter() - started,
        latencies=tuple(latencies),
        replies=replies,
        generator_cpu=time.process_time() - own,
        service_cpu=cpu_seconds((load.service,)) - service,
        worker_cpu=cpu_seconds(load.workers) - workers,
    )


def precise_loop() -> asyncio.SelectorEventLoop:
    """An event loop that sleeps to the microsecond; with epoll it would be to the millisecond."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        sys.stdout.write(runner.run(generate(Load.from_json(sys.stdin.read()))).to_json())
