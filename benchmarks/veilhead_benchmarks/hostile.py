"""Hostile requests: many, of every kind, and what each is answered with.

Messages that a service accepts are mutated in their fields, counts, residues and lengths, and sent
to every route, under every method, with headers, types, ranges and API keys of every sort. The app
is the real one, with its worker processes, and gets the requests as an ASGI server hands them on.

Every request follows from the seed and its number alone, and leaves the service as it found it, so
that one of them can be sent again by itself. What is random all the same are keys and noise.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import struct
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import numpy as np
from rich.table import Table
from starlette.types import ASGIApp, Message

from veilhead.session import EncryptedQuery, Session
from veilhead_benchmarks.console import wide_console
from veilhead_benchmarks.processes import publish_random, unit_rows
from veilhead_models.artifact import HeadArtifact
from veilhead_protocol.files import describe_file
from veilhead_protocol.manifest import BackboneSection
from veilhead_protocol.parameters import PARAMETER_SETS
from veilhead_protocol.wire import (
    KEY_HEADER_BYTES,
    MAX_KEY_BYTES,
    MAX_QUERY_BYTES,
    QUERY_HEADER_BYTES,
    REPLY_HEADER_BYTES,
)
from veilhead_service.app import create_app
from veilhead_service.model_store import publish, retire
from veilhead_service.problems import MEDIA_TYPE, PROBLEM_TYPE
from veilhead_service.retirement import Retirement
from veilhead_service.routes import MESSAGE_TYPE, Services
from veilhead_service.settings import Settings
from veilhead_service.state import State
from veilhead_service.tenants import DEFAULT_SCOPES, KeyScope, new_api_key

#: An answer that takes longer counts as none.
_ANSWER_SECONDS: Final = 10.0

#: How long the service waits for a body; few requests make it wait.
_BODY_SECONDS: Final = 0.25

#: A good query is asked after so many hostile requests.
_CHECK_EVERY: Final = 500

#: Bytes of a request in a row that no refusal may hold.
_LEAK_BYTES: Final = 8

#: Violations that are described; the others are counted.
_DESCRIBED: Final = 50

_KEY_SECONDS: Final = 86_400.0
_MUCH: Final = 1_000_000

#: name: (classes, dimensions, parameter set)
_MODELS: Final = {
    "digits": (10, 64, "standard"),
    "chapters": (22, 384, "standard"),
    "compact": (5, 384, "compact"),
    "long": (4, 3000, "standard"),  # more dimensions than coefficients: two query polynomials
}
_WITH_FILES: Final = "text"
_RETIRED: Final = "retired"

#: (status, code, retryable) of the problems of docs/http-api.md.
PROBLEMS: Final = frozenset(
    {(400, code, False) for code in ("malformed-range", "body-incomplete")}
    | {(401, "unauthenticated", False), (403, "forbidden", False)}
    | {(404, code, False) for code in ("not-found", "model-not-found", "file-not-found")}
    | {(404, "key-not-registered", False), (405, "method-not-allowed", False)}
    | {(408, "body-timeout", False), (409, "wrong-model", False), (410, "model-retired", False)}
    | {(413, "body-too-large", False), (415, "unsupported-media-type", False)}
    | {(416, "range-not-satisfiable", False)}
    | {
        (422, code, False)
        for code in (
            "malformed-digest", "invalid-request", "digest-mismatch", "wrong-length",
            "wrong-message-type", "unsupported-format-version", "wrong-parameters",
            "unknown-prng", "unknown-domain", "nonzero-padding", "wrong-layout", "seed-reused",
            "residue-out-of-range", "zero-polynomial",
        )
    }
    | {(429, code, True) for code in ("rate-limited", "budget-exhausted")}
    | {
        (503, code, True)
        for code in (
            "state-unavailable", "access-log-unavailable", "queue-full", "draining",
            "worker-unavailable",
        )
    }
)  # fmt: skip

#: What a good answer's status may be, by route and method. The routes are told apart in this order.
_ROUTES: Final[tuple[tuple[str, re.Pattern[str], dict[str, set[int]]], ...]] = tuple(
    (name, re.compile(pattern, re.DOTALL), answers)
    for name, pattern, answers in (
        ("/v1/models", r"/v1/models", {"GET": {200}}),
        ("/v1/models/{name}", r"/v1/models/[^/]+", {"GET": {200, 304}}),
        ("…/card", r"/v1/models/[^/]+/card", {"GET": {200}}),
        ("…/files/{path}", r"/v1/models/[^/]+/files/.*", {"GET": {200, 206, 304}}),
        ("…/infer", r"/v1/models/[^/]+/infer", {"POST": {200}}),
        (
            "/v1/keys/{id}",
            r"/v1/keys/[^/]+",
            {"PUT": {200, 201}, "HEAD": {200}, "DELETE": {204}},
        ),
        ("/v1/usage", r"/v1/usage", {"GET": {200}}),
        ("/metrics", r"/metrics", {"GET": {200}}),
        ("/livez", r"/livez", {"GET": {200}}),
        ("/readyz", r"/readyz", {"GET": {200}}),
        ("/version", r"/version", {"GET": {200}}),
        (
            "documentation",
            r"/openapi\.json|/docs|/docs/oauth2-redirect",
            {"GET": {200}, "HEAD": {200}},
        ),
    )
)
_OTHER: Final = "(no route)"

#: What a path without a route may be answered with.
_NOWHERE: Final = (401, 403, 404, 429, 503)
_OPEN_PATHS: Final = ("/livez", "/readyz")

#: Words of the documentation: a refusal may hold them although a request does, too.
_PUBLIC: Final = (
    b"GET /v1/models lists /v1/keys/{id} GET /v1/usage expected Content-Type "
    b"application/octet-stream application/problem+json Range: bytes=FIRST-LAST "
    b"expected Authorization: Bearer and an API key of this service the manifest lists no file "
    b"content-type content-length charset=utf-8"
)

_METHODS: Final = (
    "GET", "PUT", "POST", "HEAD", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND",
)  # fmt: skip
_NUMBERS: Final = (0, 1, 2, 3, 5, 63, 64, 65, 255, 256, 2047, 2048, 2049, 4096, 2**31, 2**32 - 1)
_BYTES: Final = (0, 1, 2, 3, 4, 127, 128, 255)

#: Offset and length of the fields of a message's header; docs/wire-format.md lists them.
_FIELDS: Final = (
    (0, 4), (4, 1), (5, 1), (6, 1), (7, 1), (8, 32), (40, 32), (72, 32), (104, 1), (105, 3),
    (108, 4), (112, 4), (116, 4), (120, 4), (124, 4), (128, 4),
)  # fmt: skip

_RANGES: Final = (
    "bytes=0-9", "bytes=-5", "bytes=5-", "bytes=0-0,5-9", "bytes=9-0", "bytes=99999999-", "bytes=",
    "bytes=a-b", "lines=0-1", "bytes=0-0," * 300, "bytes=-0", "bytes=--1", "bytes=0-99999999999999",
    "bytes=0-1-2", "bytes= 0 - 1 ", "bytes=18446744073709551616-", "bytes", "=", "bytes=0x1-0x2",
    "bytes=-", "bytes=,", "bytes=1_0-2_0", "bytes=²-³", "bytes=+1-+2",
)  # fmt: skip
_TYPES: Final = (
    "", "text/plain", "application/json", "APPLICATION/OCTET-STREAM", ";",
    "application/octet-stream;q=1", "application/octet-stream, text/html", "multipart/form-data",
    "a" * 5000, "\xff\xfe",
    "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
)  # fmt: skip
_LENGTHS: Final = (
    "", "0", "-1", "1", "999", "45673", str(2**31), str(2**64), "9" * 400, "²", "1e3", "0x10",
    " 5 ", "5,5", "+5",
)  # fmt: skip
_SUFFIXES: Final = (
    "/", "//", "/.", "/..", "/../..", "%00", "%0A", "%0D%0A", "%2F", "%2e%2e%2f", ";a=b", "%FF",
    "%", "%zz", ".json", "\\", "/infer", "/files/", "%C3%A9", "%20", "%F0%9F%98%80", "*", "{name}",
)  # fmt: skip
_HEADERS: Final = (
    "host", "x-request-id", "x-forwarded-for", "x-forwarded-prefix", "forwarded", "cookie",
    "accept", "accept-encoding", "content-encoding", "transfer-encoding", "expect", "te",
    "connection", "upgrade", "origin", "if-none-match", "if-range", "if-match", "range",
    "if-modified-since", "x-http-method-override", "traceparent", "tracestate", "baggage",
    "access-control-request-method", "content-length", "content-type", "user-agent",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One request as an ASGI server hands it on, and who sends it.

    Attributes:
        method: an HTTP method, or a word that is none.
        target: the path as it was sent, percent-encoded.
        query: what stands after the question mark.
        headers: names in lower case.
        pieces: the body, as it arrives.
        ending: `complete`, or what the connection does instead: `disconnect` or `stall`.
    """

    method: str
    target: str
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    pieces: tuple[bytes, ...] = ()
    ending: str = "complete"

    @property
    def path(self) -> str:
        """The path as a server decodes it."""
        return unquote(self.target)

    @property
    def body(self) -> bytes:
        """All of the body."""
        return b"".join(self.pieces)

    def __str__(self) -> str:
        sent = f"{self.method} {self.target[:120]}"
        return f"{sent}, {len(self.headers)} headers, a body of {len(self.body)} bytes"


@dataclass
class Answer:
    """What the app sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    starts: int = 0
    complete: bool = False


@dataclass(frozen=True)
class Violation:
    """A promise that an answer broke."""

    number: int
    request: str
    promise: str


@dataclass
class HostileReport:
    """What came of a run.

    Attributes:
        seed: what the requests follow from.
        requests: how many were sent.
        seconds: how long it took.
        answers: how often each route answered with each status and code.
        checks: good queries in between that got the right logits.
        evaluations: queries that a worker evaluated.
        broken: violations, those that are not described included.
        violations: the first of them.
    """

    seed: int
    requests: int = 0
    seconds: float = 0.0
    answers: Counter[tuple[str, int, str]] = field(default_factory=Counter)
    checks: int = 0
    evaluations: int = 0
    broken: int = 0
    violations: list[Violation] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every promise was kept, and there was something to keep."""
        return self.requests > 0 and self.checks > 0 and not self.broken

    def add(self, violation: Violation) -> None:
        """Count a violation, and describe it when it is one of the first."""
        self.broken += 1
        if len(self.violations) < _DESCRIBED:
            self.violations.append(violation)


@dataclass(frozen=True)
class _Caller:
    """A tenant: its API key, and a good query for each model under a registered key."""

    name: str
    written: str
    scopes: frozenset[KeyScope]
    sessions: dict[str, Session] = field(default_factory=dict)
    queries: dict[str, EncryptedQuery] = field(default_factory=dict)

    @property
    def key_ids(self) -> set[str]:
        return {query.key.id.hex() for query in self.queries.values()}

    @property
    def authorization(self) -> tuple[bytes, bytes]:
        return b"authorization", f"Bearer {self.written}".encode()


@dataclass(frozen=True)
class _World:
    """A running service, its models and its tenants."""

    app: ASGIApp
    services: Services
    artifacts: dict[str, HeadArtifact]
    callers: tuple[_Caller, ...]

    @property
    def tenants(self) -> tuple[_Caller, ...]:
        """The callers that may ask queries."""
        return tuple(caller for caller in self.callers if caller.queries)

    def restarts(self) -> int:
        return sum(self.services.pool.stats().restarts.values())


# --- a world ------------------------------------------------------------------------------------


def _publish_all(work: Path) -> dict[str, HeadArtifact]:
    artifacts = {
        name: publish_random(work / "store", work, name, classes, dimensions, parameters)
        for name, (classes, dimensions, parameters) in _MODELS.items()
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
        np.eye(3, 8), np.zeros(3), ["first", "second", "third"], name=_WITH_FILES
    ).with_backbone(files, section)
    head.save(work / "artifacts" / _WITH_FILES)
    publish(work / "artifacts" / _WITH_FILES, work / "store")
    publish_random(work / "store", work, _RETIRED, 3, 64)
    retire(work / "store", _RETIRED, None, Retirement(datetime(2020, 1, 1, tzinfo=UTC)))
    return artifacts


def _add_caller(state: State, name: str, scopes: frozenset[KeyScope]) -> _Caller:
    key, written = new_api_key(name, scopes, now=time.time(), expires=None)
    state.add_tenant(key)
    return _Caller(name, written, scopes)


def _encrypt_all(caller: _Caller, artifacts: dict[str, HeadArtifact]) -> None:
    for name, artifact in artifacts.items():
        session = Session(artifact.manifest)
        caller.sessions[name] = session
        caller.queries[name] = session.encrypt(unit_rows(1, artifact.weight.shape[1], 1)[0])


@asynccontextmanager
async def _running(work: Path, around: Callable[[ASGIApp], ASGIApp]) -> AsyncIterator[_World]:
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
    app = create_app(
        Settings(
            store=work / "store",
            state_directory=work / "state",
            workers=2,
            body_seconds=_BODY_SECONDS,
            # Requests come one after the other, and faster than any tenant sends them.
            rate_per_second=_MUCH,
            rate_burst=_MUCH,
            key_idle_seconds=_KEY_SECONDS,
            key_lifetime_seconds=_KEY_SECONDS,
        )
    )
    async with app.router.lifespan_context(app):
        world = _World(around(app), app.state.services, artifacts, callers)
        for caller in world.tenants:
            await _register(world, caller)
        yield world


def _put(caller: _Caller, message: bytes) -> Request:
    target = f"/v1/keys/{hashlib.sha256(message).hexdigest()}"
    headers = (caller.authorization, (b"content-type", MESSAGE_TYPE.encode()))
    return Request("PUT", target, b"", headers, (message,))


async def _register(world: _World, caller: _Caller) -> None:
    for query in caller.queries.values():
        await _send(world.app, _put(caller, query.key.message))


# --- requests -----------------------------------------------------------------------------------


def _spoilt_residue(generator: random.Random, data: bytes, start: int) -> bytes:
    """A residue at its prime, or all of them zero, at one place of a packed polynomial."""
    parameters = generator.choice(list(PARAMETER_SETS.values()))
    degree = parameters.poly_modulus_degree
    prime, width = parameters.prime, parameters.residue_bits
    size = degree * width // 8
    if len(data) < start + size:
        return data
    index = generator.choice((0, degree // 2, degree - 1))
    packed = int.from_bytes(data[start : start + size], "little")
    value = generator.choice((prime, prime - 1, prime + 1, (1 << width) - 1, 0))
    packed = packed & ~(((1 << width) - 1) << (index * width)) | value << (index * width)
    if generator.random() < 0.2:
        packed = 0
    return data[:start] + packed.to_bytes(size, "little") + data[start + size :]


def _mutated(generator: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """One mutation of a message; `others` are messages to take parts from."""
    kind = generator.choice(
        ("flip", "field", "field", "swap", "swap", "truncate", "extend", "cut", "splice", "residue",
         "count", "count", "seed", "ones")
    )  # fmt: skip
    length = len(data)
    at = generator.choice((generator.randrange(141), generator.randrange(length + 1)))
    other = generator.choice(others)
    if kind == "flip":
        if at >= length:
            return data
        flipped = data[at] ^ generator.randrange(1, 256)
        return data[:at] + bytes([flipped]) + data[at + 1 :]
    if kind == "truncate":
        short = generator.choice((at, length - 1, length - 64, KEY_HEADER_BYTES, 0))
        return data[: max(0, short)]
    if kind == "extend":
        size = generator.choice((1, 2, 64, 1000, MAX_KEY_BYTES))
        return data + generator.randbytes(size)
    if kind == "cut":
        return data[:at] + data[at + generator.randrange(1, 200) :]
    if kind == "splice":
        return data[:at] + other[at:]
    if kind == "residue":
        start = KEY_HEADER_BYTES if data[5:6] == b"\1" else QUERY_HEADER_BYTES
        return _spoilt_residue(generator, data, start)
    if kind == "seed":  # the last seed, from another message
        return data[:-64] + other[-64:]
    if kind == "ones":
        return data[:at] + b"\xff" * generator.randrange(1, 40) + data[at + 8 :]
    offset, size = generator.choice(_FIELDS if kind != "count" else _FIELDS[-6:])
    if kind == "swap":
        part = other[offset : offset + size]
    elif kind == "count":
        part = struct.pack("<I", generator.choice(_NUMBERS))
    elif size == 1:
        part = bytes([generator.choice(_BYTES)])
    else:
        part = generator.choice((bytes(size), b"\xff" * size, generator.randbytes(size)))
    return data[:offset] + part + data[offset + size :]


def _message(generator: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A message with one to three mutations; sometimes a good one, or noise."""
    draw = generator.random()
    if draw < 0.02:
        return data
    if draw < 0.06:
        size = generator.choice((0, 1, 39, 40, 131, 132, len(data), MAX_QUERY_BYTES + 1))
        return generator.randbytes(size)
    if draw < 0.08:
        return data[:QUERY_HEADER_BYTES] + generator.randbytes(len(data) - QUERY_HEADER_BYTES)
    for _ in range(generator.choice((1, 1, 2, 3))):
        data = _mutated(generator, data, others)
    return data


def _text(generator: random.Random) -> str:
    """A value that belongs nowhere."""
    size = generator.choice((0, 1, 8, 64, 65, 1000))
    alphabet = generator.choice(
        ("0123456789abcdef", "ABCDEF0123", "azAZ09._-", "%\"'<>&;,= ", "\xe9\xff\x80a", "9")
    )
    return "".join(generator.choice(alphabet) for _ in range(size))


def _spoilt_authorization(generator: random.Random, world: _World) -> list[tuple[bytes, bytes]]:
    written = generator.choice(world.callers).written
    at = generator.randrange(len(written))
    flipped = written[:at] + generator.choice("abcXYZ019_-") + written[at + 1 :]
    value = generator.choice(
        ("", "Bearer", "Bearer ", f"Bearer {flipped}", f"Basic {written}", written,
         f"Bearer  {written}", f"Bearer {written} ", f"Bearer {written}x", f"bearer {written}",
         f"Bearer {written[:-1]}", f"Bearer {written[:19]}_{'A' * 43}", f"BEARER {written}",
         f"Bearer {written.upper()}", f"Bearer {written}\xe9", f"Bearer {_text(generator)}")
    )  # fmt: skip
    header = (b"authorization", value.encode("latin-1"))
    good = (b"authorization", f"Bearer {written}".encode())
    return generator.choice(([], [header], [header], [header], [header, good], [good, good]))


def _target_of_model(generator: random.Random, world: _World, caller: _Caller) -> Request:
    name = generator.choice([*_MODELS, *[_WITH_FILES] * 6, _RETIRED, "absent", "x" * 65])
    file = generator.choice(
        ("config.json", "config.json", "model.safetensors", "model.safetensors", "empty.txt",
         "../manifest.json", "head.safetensors",
         "/etc/passwd", "..%2f..%2fhead.safetensors", "", "config.json%00", "Config.json")
    )  # fmt: skip
    target = generator.choice(("/v1/models", f"/v1/models/{name}", f"/v1/models/{name}"))
    if generator.random() < 0.5:
        target = f"/v1/models/{name}/files/{file}"
    query = b""
    if generator.random() < 0.4:
        digests = [artifact.manifest.digest.hex() for artifact in world.artifacts.values()]
        digest = generator.choice([*digests, digests[0].upper(), "0" * 64, _text(generator)])
        query = f"digest={digest}".encode("latin-1")
    headers = [caller.authorization]
    if generator.random() < 0.4:
        headers.append((b"range", generator.choice(_RANGES).encode("latin-1")))
    if generator.random() < 0.2:
        tag = generator.choice(('"x"', "*", "W/*", '"' + "0" * 64 + '"', ",,,", _text(generator)))
        name_of = generator.choice((b"if-none-match", b"if-range"))
        headers.append((name_of, tag.encode("latin-1")))
    return Request("GET", target, query, tuple(headers))


def _base(generator: random.Random, world: _World) -> Request:
    """A request of some route: its body mutated, the rest of it good."""
    caller = generator.choice(world.tenants)
    parts = [
        part
        for tenant in world.tenants
        for query in tenant.queries.values()
        for part in (query.data, query.key.message)
    ]
    model = generator.choice(["digits", "digits", *_MODELS])
    query = caller.queries[model]
    headers = (caller.authorization, (b"content-type", MESSAGE_TYPE.encode()))
    draw = generator.random()
    if draw < 0.35:
        body = _message(generator, query.data, parts)
        named = generator.choice([model] * 8 + [*_MODELS, _RETIRED, "absent"])
        return Request("POST", f"/v1/models/{named}/infer", b"", headers, (body,))
    if draw < 0.60:
        body = _message(generator, query.key.message, parts)
        request = _put(caller, body)
        if generator.random() < 0.05:
            other = generator.choice((query.key.id.hex(), "0" * 64, _text(generator)))
            request = replace(request, target=f"/v1/keys/{_quoted(other)}")
        return request
    if draw < 0.70:
        ids = sorted(key_id for tenant in world.tenants for key_id in tenant.key_ids)
        key_id = generator.choice([*ids, "0" * 64, _text(generator)])
        method = generator.choice(("HEAD", "HEAD", "DELETE", "GET"))
        return Request(method, f"/v1/keys/{_quoted(key_id)}", b"", headers[:1])
    if draw < 0.87:
        return _target_of_model(generator, world, caller)
    anybody = generator.choice(world.callers)
    target = generator.choice(
        ("/v1/usage", "/metrics", "/livez", "/readyz", "/version", "/openapi.json", "/docs",
         "/docs/oauth2-redirect", "/", "", "*", "/v1", "/v1/keys", "/v2/models", "/redoc",
         "/static/../metrics", "//metrics", "/V1/models", f"/{_quoted(_text(generator))}")
    )  # fmt: skip
    return Request("GET", target, b"", (anybody.authorization,))


def _quoted(text: str) -> str:
    return "".join(
        letter if letter.isalnum() and letter.isascii() else f"%{ord(letter):02X}"
        for letter in text
    )


def _without(headers: tuple[tuple[bytes, bytes], ...], name: bytes) -> list[tuple[bytes, bytes]]:
    return [header for header in headers if header[0] != name]


def make_request(world: _World, seed: int, number: int) -> Request:
    """The request of this number."""
    generator = random.Random(f"{seed}:{number}")  # noqa: S311
    request = _base(generator, world)
    if generator.random() < 0.08:
        method = generator.choice((*_METHODS, _text(generator)[:20] or "X"))
        request = replace(request, method=method)
    if generator.random() < 0.08:
        at = generator.randrange(len(request.target) + 1)
        suffix = generator.choice(_SUFFIXES)
        inside = request.target[:at] + suffix + request.target[at:]
        target = inside if generator.random() < 0.3 else request.target + suffix
        request = replace(request, target=target)
    if generator.random() < 0.06:
        query = "&".join(f"{_text(generator)}={_text(generator)}" for _ in range(3))
        named = generator.choice((b"", b"digest=", b"digest=a&digest=b&", b"%", b"&&==&"))
        request = replace(request, query=named + query.encode("latin-1"))
    if generator.random() < 0.08:
        rest = _without(request.headers, b"authorization")
        request = replace(request, headers=(*rest, *_spoilt_authorization(generator, world)))
    if generator.random() < 0.05:
        rest = _without(request.headers, b"content-type")
        kind = (b"content-type", generator.choice(_TYPES).encode("latin-1"))
        request = replace(request, headers=(*rest, kind))
    if generator.random() < 0.05:
        length = (b"content-length", generator.choice(_LENGTHS).encode("latin-1"))
        request = replace(request, headers=(*request.headers, length))
    for _ in range(generator.choice((0,) * 9 + (1, 2, 40))):
        value = generator.choice((_text(generator), generator.choice(_RANGES)))
        header = (generator.choice(_HEADERS).encode(), value.encode("latin-1"))
        request = replace(request, headers=(*request.headers, header))
    return _delivered(generator, request)


def _delivered(generator: random.Random, request: Request) -> Request:
    """The same request with its body in other pieces, or without its end."""
    draw, body = generator.random(), request.body
    if draw < 0.05:
        size = generator.choice((1000, 4096, 16384))
        pieces = tuple(body[at : at + size] for at in range(0, len(body), size))
        return replace(request, pieces=(b"", *pieces, b""))
    if draw < 0.06:
        return replace(request, pieces=(body[: len(body) // 2],), ending="disconnect")
    if draw < 0.0605:
        return replace(request, pieces=(body[: len(body) // 2],), ending="stall")
    if draw < 0.065:  # a body where there should be none
        return replace(request, pieces=(generator.randbytes(100),))
    return request


# --- sending ------------------------------------------------------------------------------------


async def _send(app: ASGIApp, request: Request) -> Answer:
    """Hand one request to the app, and collect what it sends."""
    answer = Answer()
    pieces = list(request.pieces) or [b""]

    async def receive() -> Message:
        if pieces:
            piece = pieces.pop(0)
            more = bool(pieces) or request.ending != "complete"
            return {"type": "http.request", "body": piece, "more_body": more}
        if request.ending == "disconnect":
            return {"type": "http.disconnect"}
        await asyncio.Event().wait()  # the connection stays open, and nothing comes
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.starts += 1
            answer.status = message["status"]
            answer.headers = {
                name.decode("latin-1").lower(): value.decode("latin-1")
                for name, value in message["headers"]
            }
        elif message["type"] == "http.response.body":
            answer.body += message.get("body", b"")
            answer.complete = not message.get("more_body", False)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.target.encode("ascii", "replace"),
        "query_string": request.query,
        "root_path": "",
        "headers": list(request.headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    async with asyncio.timeout(_ANSWER_SECONDS):
        await app(scope, receive, send)
    return answer


# --- promises -----------------------------------------------------------------------------------


def _route(path: str) -> tuple[str, dict[str, set[int]]]:
    for name, pattern, answers in _ROUTES:
        if pattern.fullmatch(path):
            return name, answers
    return _OTHER, {}


def _caller(world: _World, request: Request) -> _Caller | None:
    """Whose API key a request carries; None when it is not exactly one good key."""
    found = [value for name, value in request.headers if name == b"authorization"]
    if len(found) != 1:
        return None
    scheme, _, written = found[0].decode("latin-1").partition(" ")
    good = {caller.written: caller for caller in world.callers}
    return good.get(written) if scheme.lower() == "bearer" else None


def _printed_runs(data: bytes) -> bytes:
    return b"\n".join(re.findall(rb"[\x20-\x7e]{%d,}" % _LEAK_BYTES, data))


def _holds_of_request(shown: bytes, request: Request) -> bool:
    """Whether eight bytes in a row of a request stand in a refusal, as they are or as digits.

    The refusal is ASCII: only what is printable in the request can stand there as it is.
    """
    raw = [request.body, request.query, request.target.encode(), request.path.encode()]
    raw += [value for _, value in request.headers]
    sent = b"\n".join(_printed_runs(part) for part in raw)
    for at in range(len(shown) - _LEAK_BYTES + 1 if sent else 0):
        window = shown[at : at + _LEAK_BYTES]
        if window in sent and window not in _PUBLIC:
            return True
    for digits in re.findall(rb"[0-9a-fA-F]{16,}", shown):
        if bytes.fromhex(digits[: len(digits) // 2 * 2].decode()) in request.body:
            return True
    return False


def _broken_problem(answer: Answer, request: Request) -> tuple[str, str | None]:
    """The code of a refusal, and what is wrong with it."""
    try:
        document: dict[str, Any] = json.loads(answer.body)
        code = str(document["type"]).removeprefix(PROBLEM_TYPE)
        found = (answer.status, code, document["retryable"])
        fields = {"type", "title", "status", "detail", "request_id", "retryable"}
        typed = set(document) == fields and document["status"] == answer.status
        request_id = str(document["request_id"])
    except (ValueError, KeyError, TypeError):
        return "", "the refusal is not a problem document"
    if answer.headers.get("content-type") != MEDIA_TYPE or not typed:
        return code, "the refusal is not a typed problem"
    if found not in PROBLEMS:
        return code, f"{found} is not documented"
    if request_id != answer.headers.get("x-request-id"):
        return code, "the problem's request id is not the answer's"
    if ("retry-after" in answer.headers) is not document["retryable"]:
        return code, "Retry-After and retryable disagree"
    if not answer.body.isascii():
        return code, "the refusal holds what is not ASCII"
    shown = answer.body.replace(request_id.encode(), b"")
    shown = shown.replace(str(document["type"]).encode(), b"")
    others = ("x-request-id", "content-type", "content-length")
    values = [value for name, value in answer.headers.items() if name not in others]
    shown += b"\0" + "\0".join(values).encode("latin-1")
    if _holds_of_request(shown, request):
        return code, "the refusal holds bytes of the request"
    return code, None


def _needed(route: str) -> KeyScope | None:
    if route in ("…/infer", "/v1/keys/{id}"):
        return KeyScope.INFER
    if route.startswith(("/v1/models", "…/files")):
        return KeyScope.MODELS
    return {"/v1/usage": KeyScope.USAGE, "/metrics": KeyScope.METRICS}.get(route)


def _broken_success(
    request: Request, answer: Answer, route: str, caller: _Caller | None
) -> str | None:
    """What is wrong with an answer that is none of the problems."""
    if caller is None:
        return None if request.path in _OPEN_PATHS else "answered without a good API key"
    scope = _needed(route)
    if scope is not None and scope not in caller.scopes:
        return f"answered without the scope {scope}"
    id_in_path = request.path.rpartition("/")[2]
    asks_for_key = route == "/v1/keys/{id}" and request.method in ("HEAD", "DELETE")
    if asks_for_key and id_in_path not in caller.key_ids:
        return "a key that is not the tenant's was found"
    if route == "…/infer":
        sent = request.body
        if (
            answer.body[REPLY_HEADER_BYTES - 32 : REPLY_HEADER_BYTES]
            != hashlib.sha256(sent).digest()
        ):
            return "the reply does not belong to the query"
        if sent[72:104].hex() not in caller.key_ids:
            return "a query under a key that is not the tenant's was answered"
    return None


def _broken(world: _World, request: Request, answer: Answer) -> tuple[str, str, str | None]:
    """The route and the code of an answer, and the first promise that it broke."""
    path = request.path
    route, successes = _route(path)
    gone = request.ending == "disconnect"  # nobody is there to read the rest
    if answer.starts != 1 or not (answer.complete or gone):
        return route, "", f"got {answer.starts} answers, expected one that is complete"
    if not re.fullmatch(r"[0-9a-f]{32}", answer.headers.get("x-request-id", "")):
        return route, "", "there is no request id"
    caller = _caller(world, request)
    code = ""
    if answer.status < 400:
        if answer.status not in successes.get(request.method, ()):
            return route, code, f"{answer.status} is not documented for this route and method"
        wrong = _broken_success(request, answer, route, caller)
        if wrong is not None:
            return route, code, wrong
    else:
        code, wrong = _broken_problem(answer, request)
        if wrong is not None:
            return route, code, wrong
    if route == _OTHER and answer.status not in _NOWHERE:
        return route, code, f"got {answer.status} where no route is"
    if caller is None and path not in _OPEN_PATHS and answer.status != 401:
        return route, code, f"got {answer.status} without a good API key, expected 401"
    if route == "/metrics" and answer.status == 200:
        return route, code, None  # the operator's: they name all tenants
    shown = answer.body + "\n".join(answer.headers.values()).encode("latin-1")
    for other_caller in world.callers:
        words = {other_caller.name, other_caller.written[3:19]} | other_caller.key_ids
        words = {word for word in words if word not in path}  # an id that a client wrote itself
        if other_caller is not caller and any(word.encode() in shown for word in words):
            return route, code, "the answer tells of another tenant"
    return route, code, None


async def _restore(world: _World, request: Request, answer: Answer) -> None:
    """Leave the tenants' keys as they were before a request."""
    caller = _caller(world, request)
    if caller is None:
        return
    if request.method == "DELETE" and answer.status == 204:
        await _register(world, caller)
    if request.method == "PUT" and answer.status == 201:
        forget = Request("DELETE", request.target, b"", (caller.authorization,))
        await _send(world.app, forget)


async def _check(world: _World, number: int) -> str | None:
    """Ask a good query; what is wrong with the answer, if anything."""
    caller = world.tenants[number % len(world.tenants)]
    name = list(world.artifacts)[number // len(world.tenants) % len(world.artifacts)]
    artifact = world.artifacts[name]
    row = unit_rows(1, artifact.weight.shape[1], 2 + number)
    query = caller.sessions[name].encrypt(row[0])
    await _send(world.app, _put(caller, query.key.message))
    headers = (caller.authorization, (b"content-type", MESSAGE_TYPE.encode()))
    answer = await _send(
        world.app, Request("POST", f"/v1/models/{name}/infer", b"", headers, (query.data,))
    )
    if answer.status != 200:
        return f"a good query to {name} was answered with {answer.status}"
    logits = caller.sessions[name].decrypt(query, answer.body)
    if np.abs(logits - artifact.logits(row)[0]).max() > artifact.manifest.head.error_bound:
        return f"a good query to {name} was answered wrongly"
    return None


# --- a run --------------------------------------------------------------------------------------


async def _run(report: HostileReport, numbers: range, around: Callable[[ASGIApp], ASGIApp]) -> None:
    with tempfile.TemporaryDirectory(prefix="veilhead-hostile-") as work:
        async with _running(Path(work), around) as world:
            started = time.monotonic()
            before = world.services.pool.stats().evaluations
            for number in numbers:
                await _ask(world, report, number)
                if (number + 1) % _CHECK_EVERY == 0 or number == numbers[-1]:
                    wrong = await _check(world, number // _CHECK_EVERY)
                    report.checks += wrong is None
                    if wrong is not None:
                        report.add(Violation(number, "(a good query)", wrong))
                    if world.restarts():
                        report.add(Violation(number, "(all before)", "a worker was restarted"))
                        break
            report.evaluations = world.services.pool.stats().evaluations - before
            report.seconds = time.monotonic() - started


async def _ask(world: _World, report: HostileReport, number: int) -> None:
    request = make_request(world, report.seed, number)
    report.requests += 1
    try:
        answer = await _send(world.app, request)
    except TimeoutError:
        report.add(Violation(number, str(request), f"no answer within {_ANSWER_SECONDS:g} s"))
        return
    except Exception as error:
        promise = f"{type(error).__name__} came out of the app"
        report.add(Violation(number, str(request), promise))
        return
    route, code, wrong = _broken(world, request, answer)
    report.answers[route, answer.status, code] += 1
    if wrong is not None:
        report.add(Violation(number, str(request), wrong))
    await _restore(world, request, answer)


def run_hostile(
    *,
    requests: int,
    seed: int,
    only: int | None = None,
    around: Callable[[ASGIApp], ASGIApp] = lambda app: app,
) -> HostileReport:
    """Send so many requests, or `only` that one, and judge every answer.

    Args:
        requests: how many.
        seed: what they follow from.
        only: the number of one request, to send it alone.
        around: what stands between the requests and the app; nothing, but in tests of this.
    """
    report = HostileReport(seed)
    numbers = range(requests) if only is None else range(only, only + 1)
    asyncio.run(_run(report, numbers, around))
    return report


def show(report: HostileReport, out: Path | None) -> None:
    """Print a report, and write its summary when there is a file for it."""
    console = wide_console()
    table = Table("route", "status", "answers", "codes")
    rows: dict[tuple[str, int], Counter[str]] = {}
    for (route, status, code), count in report.answers.items():
        rows.setdefault((route, status), Counter())[code] += count
    for (route, status), codes in sorted(rows.items()):
        named = ", ".join(f"{code} {count}" for code, count in codes.most_common() if code)
        table.add_row(route, str(status), str(codes.total()), named)
    console.print(table, markup=False)
    rate = report.requests / report.seconds if report.seconds else 0.0
    console.print(
        f"{report.requests} requests in {report.seconds:.0f} s ({rate:.0f} a second), "
        f"{report.evaluations} evaluated, {report.checks} good queries right, seed {report.seed}, "
        f"{report.broken} violations",
        highlight=False,
    )
    for violation in report.violations:
        console.print(
            f"FAILED: request {violation.number}: {violation.promise}; {violation.request}; again: "
            f"veilhead-bench hostile --seed {report.seed} --only {violation.number}",
            highlight=False,
            markup=False,
        )
    if out is not None:
        summary = {
            "seed": report.seed,
            "requests": report.requests,
            "seconds": report.seconds,
            "evaluations": report.evaluations,
            "checks": report.checks,
            "violations": report.broken,
            "answers": [
                {"route": route, "status": status, "code": code or None, "count": count}
                for (route, status, code), count in sorted(report.answers.items())
            ],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", "utf-8")
