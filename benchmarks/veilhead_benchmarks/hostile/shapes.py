"""What is done to a connection, rather than asked on it.

Every shape keeps to the loopback net, and to the seconds and bytes that its constants say. A shape
gives how many requests it sent, and the first promise that was broken.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final

from veilhead_benchmarks.hostile.promises import broken
from veilhead_benchmarks.hostile.wire import (
    Answer,
    Connection,
    NoAnswerError,
    Request,
    UnreadableError,
)
from veilhead_benchmarks.hostile.world import BODY_SECONDS, PEER_CONNECTIONS, UNREAD_SECONDS, World
from veilhead_service.framing import MAX_PIPELINED
from veilhead_service.routes import MESSAGE_TYPE

#: A stream is so many windows of requests, each sent at once and then read.
_WINDOWS: Final = 32

_FLOOD_SECONDS: Final = 0.2
_FLOOD_BYTES: Final = 4 * 2**20

#: Seconds that the service may take beyond its own limits to end a connection.
_SLACK_SECONDS: Final = 8.0

_STRANGER: Final = Request("GET", "/v1/models")
_LIVE: Final = Request("GET", "/livez")

#: Told of a request that was answered, and what it was answered with.
Judge = Callable[[Request, Answer], str | None]


@dataclass
class Sent:
    """What came of a shape."""

    requests: int = 0
    broken: str | None = None

    def fail(self, promise: str) -> None:
        """Note a broken promise, the first of them."""
        self.broken = self.broken or promise


def _small(generator: random.Random, world: World) -> Request:
    """A request without a body, as many can be sent of at once."""
    target = generator.choice(
        ("/livez", "/livez", "/readyz", "/version", "/v1/models", "/v1/models/digits",
         "/v1/models/absent", "/v1/keys/" + "0" * 64, "/v2", "/v1/usage")
    )  # fmt: skip
    method = generator.choice(("GET",) * 8 + ("HEAD", "DELETE"))
    request = Request(method, target)
    draw = generator.random()
    if draw < 0.5:
        return request
    written = generator.choice(world.callers).authorization
    if draw < 0.6:
        written = (written[0], written[1][:-1] + b"_")
    return replace(request, headers=(written,))


def stream(generator: random.Random, world: World, judge: Judge) -> Sent:
    """As many requests at once as may be, again and again, each answered in its turn."""
    sent = Sent()
    with Connection(world.service.port) as connection:
        for _ in range(_WINDOWS):
            window = [_small(generator, world) for _ in range(MAX_PIPELINED)]
            connection.send(b"".join(request.head() for request in window))
            for request in window:
                sent.requests += 1
                try:
                    answer = connection.read(to_head=request.method == "HEAD")
                except (NoAnswerError, UnreadableError) as error:
                    sent.fail(f"{request}: {error}")
                    return sent
                wrong = judge(request, answer)
                if wrong is not None:
                    sent.fail(f"{request}: {wrong}")
    return sent


def flood(generator: random.Random, world: World, judge: Judge) -> Sent:  # noqa: ARG001
    """More requests at once than may be, on one connection, and nothing is read."""
    head = generator.choice((_LIVE, _STRANGER)).head()
    with Connection(world.service.port, small=generator.random() < 0.5) as connection:
        taken = connection.push(head * 500, _FLOOD_SECONDS, _FLOOD_BYTES)
        sent = Sent(1)  # what the kernel took for the service is no request yet
        if taken >= _FLOOD_BYTES:
            sent.fail(f"the service took {taken} bytes of requests that wait for each other")
    return sent


def _linger(world: World, number: int, what: str, seconds: float, connection: Connection) -> None:
    """Leave a connection to the service, which has so long to end it."""
    world.lingering.append((number, what, time.monotonic() + seconds + _SLACK_SECONDS, connection))


def deaf(generator: random.Random, world: World, number: int) -> Sent:
    """Connections that ask, as much as they may, and never read."""
    sent = Sent()
    head = generator.choice((_LIVE, _STRANGER)).head()
    for _ in range(4):
        connection = Connection(world.service.port, small=True)
        sent.requests += 1
        connection.push(head, 0.05, 64 * 2**10)
        _linger(world, number, "a connection that never reads", UNREAD_SECONDS, connection)
    return sent


def unfinished(generator: random.Random, world: World, number: int) -> Sent:
    """Connections that begin a header, or send nothing, and wait."""
    head = generator.choice((_LIVE, _STRANGER, replace(_STRANGER, headers=((b"a", b"b" * 500),))))
    for _ in range(4):
        connection = Connection(world.service.port)
        whole = head.head()
        connection.send(whole[: generator.choice((0, 1, len(whole) // 2, len(whole) - 1))])
        _linger(world, number, "a header that does not end", BODY_SECONDS, connection)
    return Sent(4)


def slow(generator: random.Random, world: World, judge: Judge) -> Sent:
    """A tenant's body that stops."""
    caller = generator.choice(world.tenants)
    headers = (caller.authorization, (b"content-type", MESSAGE_TYPE.encode()))
    request = Request("POST", "/v1/models/digits/infer", b"", headers, (b"VEIL",), "stall")
    return one(request, world, judge)


def crowd(generator: random.Random, world: World, judge: Judge) -> Sent:
    """More connections than one address may have; a new one is answered all the same."""
    sent = Sent()
    with ExitStack() as stack:
        many = [
            stack.enter_context(Connection(world.service.port, address="127.0.0.2"))
            for _ in range(PEER_CONNECTIONS + generator.randrange(8, 32))
        ]
        sent.requests += len(many)
        found = one(_LIVE, world, judge, address="127.0.0.2")
        sent.requests += found.requests
        if found.broken is not None:
            sent.fail(f"while there are too many connections: {found.broken}")
        if not any(connection.is_ended() for connection in many):
            sent.fail(f"one address holds {len(many)} connections")
    return sent


def one(request: Request, world: World, judge: Judge, *, address: str = "127.0.0.1") -> Sent:
    """A request on a connection of its own; whatever follows its answer is a refusal."""
    sent = Sent(1)
    answered = False
    with Connection(world.service.port, address=address) as connection:
        connection.send_request(request)
        try:
            wrong = judge(request, connection.read(to_head=request.method == "HEAD"))
            answered = True
            if wrong is not None:
                sent.fail(wrong)
            if request.is_plain and request.ending == "complete":
                return sent
            connection.end_sending()
            while True:  # the rest of a body may be read as more
                if connection.read().status != 400:
                    sent.fail("one request got two answers")
        except NoAnswerError as error:
            if not answered and request.is_plain and request.ending != "disconnect":
                sent.fail(f"no answer: {error}")
        except UnreadableError as error:
            sent.fail(str(error))
    return sent


# --- bytes that are read in two ways, or in none ------------------------------------------------

_HIDDEN: Final = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"

_SMUGGLING: Final = (
    b"Content-Length: 4\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nContent-Length: 4",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    b"Transfer-Encoding: xchunked",
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding:\x0bchunked",
    b"Transfer-Encoding: chunked, identity",
    b"Transfer-Encoding\r\n : chunked",
    b"Content-Length: 4\r\nContent-Length: 40",
    b"Content-Length: +4",
    b"Content-Length: 4, 4",
    b"Content-Length: 0x4",
    b"Content-Length: -1",
    b"Content-Length : 4",
    b"Host: y",
    b"host: x",
    b"A\x00: b",
    b"A: b\rC: d",
    b" folded",
    b"no colon",
    b": no name",
    b"A: " + b"b" * 70_000,
    b"\r\n".join([b"a: b"] * 200),
)
_LINES: Final = (
    b"GET /livez", b"GET /livez HTTP/0.9", b"GET /livez HTTP/1.2x", b"GET /livez HTTP/2.0",
    b"GET\t/livez HTTP/1.1",
    b"get /livez HTTP/1.1",
    b"GET http://y/livez HTTP/1.1", b"GET http://u@x/livez HTTP/1.1", b"GET livez HTTP/1.1",
    b"GET ftp://x/livez HTTP/1.1", b"GET * HTTP/1.1", b"CONNECT x:1 HTTP/1.1", b"GET /a#b HTTP/1.1",
    b"GET /\xff HTTP/1.1", b"PRI * HTTP/2.0", b"\x16\x03\x01\x02\x00\x01", b"\x00" * 40, b"",
)  # fmt: skip


def _judge_bytes(world: World, data: bytes, judge: Judge, *, most: int) -> Sent:
    """Send bytes of a stranger, and judge every answer as one to a stranger."""
    sent = Sent(1)
    with Connection(world.service.port) as connection:
        connection.send(data)
        connection.end_sending()
        answers = 0
        try:
            while True:
                answer = connection.read(to_head=data.startswith(b"HEAD"))
                answers += 1
                wrong = judge(Request("GET", "/livez", pieces=(data,)), answer)
                if answer.status in (401, 405):  # it named something else than /livez
                    wrong = None
                if wrong is not None:
                    sent.fail(wrong)
                if answer.status >= 500:
                    sent.fail(f"got {answer.status}")
        except NoAnswerError as error:
            if "time" in str(error):
                sent.fail("the connection was left open")
        except UnreadableError as error:
            sent.fail(str(error))
        if answers > most:
            sent.fail(f"got {answers} answers to one request")
    return sent


def ambiguous(generator: random.Random, world: World, judge: Judge) -> Sent:
    """A request that can be read in two ways, with another one hidden in it."""
    if generator.random() < 0.4:
        line = generator.choice(_LINES)
        return _judge_bytes(world, line + b"\r\nHost: x\r\n\r\n" + _HIDDEN, _refused(judge), most=1)
    field = generator.choice(_SMUGGLING)
    head = b"POST /livez HTTP/1.1\r\nHost: x\r\n" + field + b"\r\n\r\n"
    return _judge_bytes(world, head + b"0\r\n\r\n" + _HIDDEN, _refused(judge), most=1)


def _refused(judge: Judge) -> Judge:
    def judged(request: Request, answer: Answer) -> str | None:
        # Not plain to the judge: what was sent stands in the body of what it is shown.
        shown = replace(request, headers=((b"te", b""),))
        if answer.status != 400:
            return f"got {answer.status} for what can be read in two ways, expected 400"
        return judge(shown, answer)

    return judged


def trailers(generator: random.Random, world: World, judge: Judge) -> Sent:
    """Fields after a body, which stand for no header."""
    caller = generator.choice(world.callers)
    written = b": ".join(caller.authorization)
    head = _STRANGER.head()[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
    with Connection(world.service.port) as connection:
        connection.send(head + b"1\r\na\r\n0\r\n" + written + b"\r\n\r\n")
        sent = Sent(1)
        try:
            answer = connection.read()
        except (NoAnswerError, UnreadableError) as error:
            sent.fail(str(error))
            return sent
        wrong = judge(_STRANGER, answer)
        if wrong is not None:
            sent.fail(f"an API key in the trailers: {wrong}")
    return sent


def garbled(generator: random.Random, world: World, judge: Judge) -> Sent:
    """A stranger's request with some bytes of it replaced, taken out or put in."""
    request = generator.choice((_LIVE, _STRANGER, replace(_LIVE, pieces=(b"body",))))
    data = request.head() + request.body
    for _ in range(generator.choice((1, 1, 2, 5))):
        at = generator.randrange(len(data))
        part = generator.choice(
            (b"\r", b"\n", b"\r\n", b"\0", b" ", b"\t", b":", b"\x80", b"\xff", b"\r\n\r\n",
             generator.randbytes(3), b"")
        )  # fmt: skip
        data = data[:at] + part + data[at + generator.randrange(2) :]

    def judged(shown: Request, answer: Answer) -> str | None:
        if answer.status < 400 and b"live" not in answer.body + b"live" * data.startswith(b"HEAD"):
            return f"a stranger got {answer.status}"
        return judge(replace(shown, headers=((b"te", b""),)), answer)

    return _judge_bytes(world, data, judged, most=3)


def judge_of(world: World, count: Callable[[str, int, str], None]) -> Judge:
    """The judge of single answers, which counts them by route, status and code."""

    def judge(request: Request, answer: Answer) -> str | None:
        route, code, wrong = broken(world, request, answer)
        count(route, answer.status, code)
        return wrong

    return judge
