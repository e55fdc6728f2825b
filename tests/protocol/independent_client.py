"""A second client, written from docs/wire-format.md alone, to hold that page to its word.

FOR TESTS ONLY. It is not constant time, wipes nothing, rotates no keys and does no HTTP. It uses
numpy and the standard library: no package of Veilhead, no TenSEAL, no SEAL. It speaks the plainest
dialect: PRNG 2 (SHAKE256) and domain 0 (coefficients).
"""

from __future__ import annotations

import hashlib
import json
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

_BLOCK_BYTES = 4096
_PRNG_SHAKE256 = 2
_DOMAIN_COEFFICIENT = 0

PARAMETERS: dict[str, dict[str, Any]] = {
    "standard": {
        "degree": 4096,
        "prime": 0x1FFFFFFFFB4001,
        "hints": 2900,
        "id": "ccf9c15dc6e6ed7e3b72fc28fa85d88b8faf5964db7d0fcd546e8b8a78651ef6",
    },
    "compact": {
        "degree": 2048,
        "prime": 0x3FFFFFFFFC001,
        "hints": 1152,
        "id": "e8be5c106c7939a3890c0f21a923309ed3cd81ccd7de2c0b77ef591331bdb412",
    },
}


# --- layouts -------------------------------------------------------------------------------------

Head = tuple[str, int, int, int, int]
"""The set's name, d, C, e - k and the group limit."""


def _most_wanted(head: Head) -> int:
    most: int = PARAMETERS[head[0]]["hints"] // (head[3] + 11)
    return most


def _cheapest(head: Head, texts: int) -> tuple[int, int, int, int, int] | None:
    """Cost, group, block length, pieces and replies; None where there is no layout."""
    name, dimensions, classes, _, limit = head
    degree, most = PARAMETERS[name]["degree"], _most_wanted(head)
    groups = 1 if texts > most else min(limit, most // texts, classes)
    best: tuple[int, int, int, int, int] | None = None
    for group in range(1, groups + 1):
        longest = degree // (texts * group)
        if longest == 0 or texts * classes > 2**20:
            break
        pieces, replies = -(-dimensions // longest), -(-classes // group)
        cost = 20 * pieces + 20 * replies + pieces * replies
        if pieces <= 1024 and (best is None or cost < best[0]):
            best = (cost, group, -(-dimensions // pieces), pieces, replies)
    return best


def block_sizes(head: Head) -> list[int]:
    """The numbers of texts that a block may have."""
    most, left, texts = _most_wanted(head), 4096, 2
    sizes: list[int] = []
    while texts <= most:
        found = _cheapest(head, texts)
        if found is None or left - found[3] * found[4] < 2048:
            break
        sizes.append(texts)
        left -= found[3] * found[4]
        texts *= 2
    best = None
    for texts in range((sizes or [1])[-1] + 1, most + 1):
        found = _cheapest(head, texts)
        if found is None or found[3] * found[4] > left:
            continue
        # (cost + 40) / texts, without fractions
        if best is None or (found[0] + 40) * best[1] < best[0] * texts:
            best = (found[0] + 40, texts)
    if best is not None:
        last = _cheapest(head, sizes[-1]) if sizes else None
        if last is None or best[0] * sizes[-1] < (last[0] + 40) * best[1]:
            sizes.append(best[1])
    return sizes


def choose_layout(head: Head, texts: int, *, bulk: bool = False) -> tuple[int, int, int, int]:
    """Layout byte, block length, pieces and group."""
    found = _cheapest(head, texts)
    kind = 1 if texts == 1 else 2 if texts <= _most_wanted(head) else 3
    if found is None or (kind == 2 and texts not in block_sizes(head)) or (kind == 3 and not bulk):
        raise ValueError(f"no request of {texts} texts")
    _, group, block, pieces, _ = found
    return kind, block, pieces, group


# --- polynomials modulo X^N + 1 ------------------------------------------------------------------


def times_ternary(polynomial: Integers, ternary: Integers, modulus: int) -> Integers:
    """The negacyclic product [N] modulo a modulus below 2^53, one shifted row at a time."""
    degree = len(polynomial)
    total = np.zeros(degree, dtype=np.int64)
    doubled = np.concatenate([(modulus - polynomial) % modulus, polynomial])  # -a, a
    for added, shift in enumerate(np.flatnonzero(ternary), start=1):
        # Coefficient i of a X^shift is a[i - shift], negated where i < shift.
        row = doubled[degree - shift : 2 * degree - shift]
        total += row if ternary[shift] > 0 else modulus - row
        if added % 512 == 0:
            total %= modulus  # 2^53 * 512 still fits
    return total % modulus


def expand(seed: bytes, degree: int, prime: int) -> Integers:
    """The residues that a seed stands for: [N]."""
    counter = 0
    pending = np.empty(0, dtype="<u8")

    def draw(count: int) -> NDArray[np.uint64]:
        nonlocal counter, pending
        while len(pending) < count:
            block = hashlib.shake_256(seed + struct.pack("<Q", counter)).digest(_BLOCK_BYTES)
            pending = np.concatenate([pending, np.frombuffer(block, dtype="<u8")])
            counter += 1
        drawn, pending = pending[:count], pending[count:]
        return drawn

    words = draw(degree).copy()
    bound = 2**64 - 1 - (2**64 - 1) % prime - 1
    for position in np.flatnonzero(words >= np.uint64(bound)):
        while words[position] >= bound:
            words[position] = draw(1)[0]
    return (words % np.uint64(prime)).astype(np.int64)


def pack(values: Sequence[int], width: int) -> bytes:
    joined = 0
    for value in reversed(values):
        joined = joined << width | int(value)
    return joined.to_bytes(-(-len(values) * width // 8), "little")


def unpack(data: bytes, count: int, width: int) -> list[int]:
    joined = int.from_bytes(data, "little")
    if joined >> (count * width):
        raise ValueError("padding bits are set")
    mask = (1 << width) - 1
    return [joined >> (width * i) & mask for i in range(count)]


# --- the client ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What a client takes from a manifest's bytes."""

    digest: bytes
    name: str
    degree: int
    prime: int
    parameter_id: bytes
    texts: int
    kind: int
    dimensions: int
    classes: int
    block: int
    pieces: int
    group: int
    downscale_bits: int
    scale_bits: int
    query_scale_bits: int
    reply_bits: int
    embedding_scale: float
    error_bound: float

    @classmethod
    def from_manifest(cls, data: bytes, texts: int = 1) -> Model:
        document = json.loads(data)
        if document["format"] != "veilhead-manifest/2":
            raise ValueError("a manifest of another format")
        head, parameters = document["head"], PARAMETERS[document["parameters"]]
        if document["parameters_id"] != parameters["id"]:
            raise ValueError("a parameter set of that name with other numbers")
        degree, dimensions = parameters["degree"], head["dimensions"]
        classes = len(head["labels"])
        served_exponent = head["exponent"] - head["downscale_bits"]
        kind, block, pieces, group = choose_layout(
            (document["parameters"], dimensions, classes, served_exponent, head["group_limit"]),
            texts,
            bulk=document["policy"]["bulk"],
        )
        return cls(
            digest=hashlib.sha256(data).digest(),
            name=document["name"],
            degree=degree,
            prime=parameters["prime"],
            parameter_id=bytes.fromhex(parameters["id"]),
            texts=texts,
            kind=kind,
            dimensions=dimensions,
            classes=classes,
            block=block,
            pieces=pieces,
            group=group,
            downscale_bits=head["downscale_bits"],
            scale_bits=head["scale_bits"],
            query_scale_bits=head["scale_bits"] - head["weight_scale_bits"],
            reply_bits=head["reply_bits"],
            embedding_scale=document["embedding"]["scale"],
            error_bound=head["error_bound"],
        )

    @property
    def replies(self) -> int:
        return -(-self.classes // self.group)

    def prefix(self, kind: int, prng: int, domain: int) -> bytes:
        return struct.pack("<4s4B32s", b"VEIL", 2, kind, prng, domain, self.parameter_id)

    def target(self, key_id: bytes, polynomials: int) -> bytes:
        counts = (self.texts, self.dimensions, self.classes, self.block, self.pieces, self.group)
        return self.digest + key_id + struct.pack("<B3x7I", self.kind, *counts, polynomials)

    def place(self, rows: NDArray[np.float64]) -> Integers:
        """Embeddings [texts, d] as coefficients of the query polynomials: [pieces, N]."""
        message = np.zeros((self.pieces, self.degree), dtype=np.int64)
        scaled = np.rint(rows * 2.0**self.query_scale_bits).astype(np.int64)
        for text, row in enumerate(scaled):
            for piece in range(self.pieces):
                features = row[piece * self.block : (piece + 1) * self.block]
                start = text * self.group * self.block
                message[piece, start : start + len(features)] = features
        return message


class Client:
    """One secret, and everything that is done with it."""

    def __init__(self, model: Model, secret: Integers | None = None) -> None:
        self.model = model
        if secret is None:
            secret = np.array([secrets.randbelow(3) - 1 for _ in range(model.degree)])
        self._secret = secret
        no_message = np.zeros(model.degree, dtype=np.int64)
        self.key_message = model.prefix(1, _PRNG_SHAKE256, _DOMAIN_COEFFICIENT)
        self.key_message += self._encrypt(no_message)
        self.key_id = hashlib.sha256(self.key_message).digest()

    def _encrypt(self, message: Integers) -> bytes:
        """-(a s + e) + m, packed, and the 64 fresh bytes that a comes from."""
        degree, prime = self.model.degree, self.model.prime
        seed = secrets.token_bytes(64)
        error = np.array([_cbd21() for _ in range(degree)], dtype=np.int64)
        product = times_ternary(expand(seed, degree, prime), self._secret, prime)
        residues = (message % prime - product - error) % prime
        return pack(residues.tolist(), prime.bit_length()) + seed

    def query(self, embeddings: NDArray[np.float64], *, with_key: bool = False) -> bytes:
        """The query message for embeddings [texts, d], or [d] for one text."""
        model = self.model
        scaled = embeddings.reshape(model.texts, -1).astype(np.float64) / model.embedding_scale
        scaled = scaled / np.maximum(1.0, np.linalg.norm(scaled, axis=1, keepdims=True))
        return (
            model.prefix(4 if with_key else 2, _PRNG_SHAKE256, _DOMAIN_COEFFICIENT)
            + model.target(self.key_id, model.pieces)
            + (self.key_message if with_key else b"")
            + b"".join(map(self._encrypt, model.place(scaled)))
        )

    def logits(self, query: bytes, reply: bytes) -> NDArray[np.float64]:
        """Logits [texts * C] of the reply to that query: rounded to 2^-12, then times 2^k."""
        model, bits = self.model, self.model.reply_bits
        expected = (
            model.prefix(3, 0, 0)
            + model.target(self.key_id, model.replies)
            + struct.pack("<I", bits)
            + hashlib.sha256(query).digest()
        )
        if reply[: len(expected)] != expected:
            raise ValueError("not the reply to this query")
        units = self.decrypt(reply[len(expected) :])
        served = np.array(units) * (model.prime / 2 ** (bits + model.scale_bits))
        return np.rint(served * 4096) / 4096 * 2**model.downscale_bits

    def decrypt(self, body: bytes) -> list[int]:
        """The integers of a reply, after its header: [texts * C]. Never shown to anybody."""
        model, bits = self.model, self.model.reply_bits
        degree, offset = model.degree, 0
        units: list[list[int]] = [[] for _ in range(model.texts)]
        for number in range(model.replies):
            rows = min(model.group, model.classes - number * model.group)
            wanted = model.texts * rows
            parts = []
            for count in (wanted, degree):
                length = -(-count * bits // 8)
                parts.append(unpack(body[offset : offset + length], count, bits))
                offset += length
            c0, c1 = parts[0], np.array(parts[1], dtype=np.int64)
            for place, value in enumerate(c0):
                text, row = divmod(place, rows)
                at = (text * model.group + row) * model.block + model.block - 1
                # s[j] c1[at - j] for j <= at, and -s[j] c1[at - j + N] above.
                turned = np.concatenate([c1[at::-1], -c1[:at:-1]])
                inner = value + int(turned @ self._secret)
                half = 1 << (bits - 1)
                units[text].append((inner + half) % (2 * half) - half)
        if offset != len(body):
            raise ValueError("a reply of another length")
        return [value for row in units for value in row]


def _cbd21() -> int:
    bits = secrets.randbits(42)
    return (bits & 0x1FFFFF).bit_count() - (bits >> 21).bit_count()
