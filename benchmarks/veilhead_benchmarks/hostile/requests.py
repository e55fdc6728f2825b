"""Requests of every kind: messages that a service accepts, mutated, to every route.

Every request follows from the seed and its number alone. What is random all the same are keys and
noise.
"""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from typing import Final

from veilhead_benchmarks.hostile.wire import Request
from veilhead_benchmarks.hostile.world import MODELS, RETIRED, WITH_FILES, Caller, World, put
from veilhead_protocol.parameters import PARAMETER_SETS
from veilhead_protocol.wire import (
    KEY_HEADER_BYTES,
    MAX_KEY_BYTES,
    MAX_QUERY_BYTES,
    QUERY_HEADER_BYTES,
)
from veilhead_service.routes import MESSAGE_TYPE

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


def _spoilt_authorization(generator: random.Random, world: World) -> list[tuple[bytes, bytes]]:
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


def _target_of_model(generator: random.Random, world: World, caller: Caller) -> Request:
    name = generator.choice([*MODELS, *[WITH_FILES] * 6, RETIRED, "absent", "x" * 65])
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


def _base(generator: random.Random, world: World) -> Request:
    """A request of some route: its body mutated, the rest of it good."""
    caller = generator.choice(world.tenants)
    parts = [
        part
        for tenant in world.tenants
        for query in tenant.queries.values()
        for part in (query.data, query.key.message)
    ]
    model = generator.choice(["digits", "digits", *MODELS])
    query = caller.queries[model]
    headers = (caller.authorization, (b"content-type", MESSAGE_TYPE.encode()))
    draw = generator.random()
    if draw < 0.35:
        body = _message(generator, query.data, parts)
        named = generator.choice([model] * 8 + [*MODELS, RETIRED, "absent"])
        return Request("POST", f"/v1/models/{named}/infer", b"", headers, (body,))
    if draw < 0.60:
        body = _message(generator, query.key.message, parts)
        request = put(caller, body)
        if generator.random() < 0.05:
            other = generator.choice((query.key.id.hex(), "0" * 64, _text(generator)))
            request = replace(request, target=f"/v1/keys/{_quoted(other)}")
        return request
    if draw < 0.70:
        # In an order that does not depend on the ids, which are random.
        queries = [query for tenant in world.tenants for query in tenant.queries.values()]
        ids = [query.key.id.hex() for query in queries]
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


def make_request(world: World, seed: int, number: int) -> Request:
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
