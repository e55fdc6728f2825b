"""Sends recorded queries again and again: `python -m veilhead_benchmarks.replay`.

A process of its own, which reads a `Stream` as a line of JSON from standard input, prints `READY`,
reads the moment of `time.monotonic` to begin at, and prints its `Outcome` as JSON. Queries were
encrypted before, and of a reply only header and length are looked at: it takes little CPU from the
service on the same machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from base64 import b64decode, b64encode
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from typing import Final

_ANSWER_SECONDS: Final = 60.0
#: A polite caller sends a refused query again until so long after the end.
_GRACE_SECONDS: Final = 30.0
_RECONNECT_SECONDS: Final = 0.05
_MAX_HEAD_BYTES: Final = 2**20

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *([0-9]{1,9})\r\n", re.IGNORECASE)
_RETRY_AFTER: Final = re.compile(rb"\r\nretry-after: *([0-9]{1,9})\r\n", re.IGNORECASE)
_CLOSE: Final = re.compile(rb"\r\nconnection: *close\r\n", re.IGNORECASE)
_PROBLEM: Final = re.compile(rb"urn:veilhead:problem:([a-z-]+)")

READY: Final = "ready\n"

_REFUSALS: Final = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})


@dataclass(frozen=True)
class Recorded:
    """A query, and what every reply to it has.

    Attributes:
        request: the whole HTTP request.
        reply_header: what the reply message begins with; it names model, key and query.
        reply_bytes: the length of the reply message.
    """

    request: bytes
    reply_header: bytes
    reply_bytes: int


@dataclass(frozen=True)
class Caller:
    """Somebody of a tenant who sends these queries in turn, on several connections at once."""

    tenant: str
    connections: int
    queries: tuple[Recorded, ...]


@dataclass(frozen=True)
class Stream:
    """What to send.

    Attributes:
        port: of loopback, where the service listens.
        callers: who sends; each connection sends again as soon as it has a reply.
        seconds: how long new queries are sent.
        polite: whether a refused query waits for `Retry-After`; else it is sent again at once.
        niceness: of this process.
        samples: replies to hand back whole, about; they are spread over the time.
    """

    port: int
    callers: tuple[Caller, ...]
    seconds: float
    polite: bool = True
    niceness: int = 0
    samples: int = 100

    def to_json(self) -> str:
        """The text that `from_json` reads."""
        return json.dumps(asdict(self), default=lambda data: b64encode(data).decode())

    @classmethod
    def from_json(cls, text: str) -> Stream:
        """The stream that a text describes."""
        fields = json.loads(text)
        fields["callers"] = tuple(
            Caller(
                caller["tenant"],
                caller["connections"],
                tuple(
                    Recorded(
                        b64decode(query["request"]),
                        b64decode(query["reply_header"]),
                        query["reply_bytes"],
                    )
                    for query in caller["queries"]
                ),
            )
            for caller in fields["callers"]
        )
        return cls(**fields)


@dataclass
class Tally:
    """What came of one tenant's queries.

    Attributes:
        asked: queries that were sent, each counted once.
        answered: those whose reply has the right length and header.
        in_time: those of them that were answered before new queries ended.
        wrong: those whose reply has not.
        failed: those that were answered with an error that is no refusal, by its code.
        abandoned: those that were still refused at the end.
        refused: refusals, by code; one query may have many.
        broken: connections that ended within a query, or did not answer in time.
        latencies: seconds of the answered, from the first sending to the end of the reply.
    """

    asked: int = 0
    answered: int = 0
    in_time: int = 0
    wrong: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    abandoned: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    broken: int = 0
    latencies: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What came of a stream.

    Attributes:
        seconds: from the beginning to the last answer.
        cpu_seconds: of this process meanwhile.
        tallies: by tenant.
        samples: whole replies, with the places of their caller and query.
    """

    seconds: float
    cpu_seconds: float
    tallies: dict[str, Tally]
    samples: list[tuple[int, int, bytes]]

    def to_json(self) -> str:
        """The text that `from_json` reads."""
        return json.dumps(asdict(self), default=lambda data: b64encode(data).decode())

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        """The outcome that a text describes."""
        fields = json.loads(text)
        tallies = {tenant: Tally(**tally) for tenant, tally in fields["tallies"].items()}
        samples = [(caller, query, b64decode(reply)) for caller, query, reply in fields["samples"]]
        return cls(fields["seconds"], fields["cpu_seconds"], tallies, samples)


class _Connection:
    """One connection, opened when it is needed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes, bytes]:
        """The answer's status, head and body."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(
                "127.0.0.1", self._port, limit=_MAX_HEAD_BYTES
            )
        reader, writer = self._streams
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        body = await reader.readexactly(int(length[1]) if length else 0)
        if _CLOSE.search(head):
            self.close()
        return int(head[9:12]), head, body

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class _Replay:
    """A stream on its way."""

    def __init__(self, stream: Stream, begin: float) -> None:
        self._stream = stream
        self.tallies = {caller.tenant: Tally() for caller in stream.callers}
        self.samples: list[tuple[int, int, bytes]] = []
        self._begin = self._next_sample = begin
        self._end = begin + stream.seconds

    async def run(self) -> None:
        """Send from the beginning to the last answer."""
        await asyncio.sleep(max(0.0, self._begin - time.monotonic()))
        async with asyncio.TaskGroup() as group:
            for place, caller in enumerate(self._stream.callers):
                for first in range(caller.connections):
                    group.create_task(self._send(place, caller, first))

    async def _send(self, place: int, caller: Caller, first: int) -> None:
        connection = _Connection(self._stream.port)
        number = place + first  # not all begin with the same query
        try:
            while time.monotonic() < self._end:
                number = (number + 1) % len(caller.queries)
                await self._ask(connection, caller, place, number)
        finally:
            connection.close()

    async def _ask(self, connection: _Connection, caller: Caller, place: int, number: int) -> None:
        """Send a query until it is answered."""
        tally, query = self.tallies[caller.tenant], caller.queries[number]
        patience = self._end + (_GRACE_SECONDS if self._stream.polite else 0.0)
        started = time.monotonic()
        tally.asked += 1
        while True:
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    status, head, body = await connection.ask(query.request)
            except (OSError, asyncio.IncompleteReadError):  # and TimeoutError, which is an OSError
                tally.broken += 1
                connection.close()
                pause = _RECONNECT_SECONDS
            else:
                if status == HTTPStatus.OK:
                    self._judge(tally, query, body, place, number, started)
                    return
                code = _PROBLEM.search(body)
                name = code[1].decode() if code else str(status)
                if status not in _REFUSALS:
                    tally.failed[name] = tally.failed.get(name, 0) + 1
                    return
                tally.refused[name] = tally.refused.get(name, 0) + 1
                after = _RETRY_AFTER.search(head)
                pause = float(after[1]) if after and self._stream.polite else 0.0
            if time.monotonic() > patience:
                tally.abandoned += 1
                return
            await asyncio.sleep(pause)

    def _judge(
        self,
        tally: Tally,
        query: Recorded,
        reply: bytes,
        place: int,
        number: int,
        started: float,
    ) -> None:
        now = time.monotonic()
        if len(reply) != query.reply_bytes or not reply.startswith(query.reply_header):
            tally.wrong += 1
            return
        tally.answered += 1
        tally.in_time += now < self._end
        tally.latencies.append(now - started)
        if now >= self._next_sample:
            self._next_sample += self._stream.seconds / self._stream.samples
            self.samples.append((place, number, reply))


async def replay(stream: Stream, begin: float) -> Outcome:
    """Send it from then on, by `time.monotonic`, and judge every answer."""
    own = time.process_time()
    sending = _Replay(stream, begin)
    await sending.run()
    return Outcome(
        seconds=time.monotonic() - begin,
        cpu_seconds=time.process_time() - own,
        tallies=sending.tallies,
        samples=sending.samples,
    )


def main() -> None:
    """Replay the stream of standard input."""
    stream = Stream.from_json(sys.stdin.readline())
    os.nice(stream.niceness)
    sys.stdout.write(READY)
    sys.stdout.flush()
    begin = float(sys.stdin.readline())
    sys.stdout.write(asyncio.run(replay(stream, begin)).to_json())


if __name__ == "__main__":
    main()
