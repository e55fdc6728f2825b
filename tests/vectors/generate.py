"""Rewrite the golden vectors beside this file: `python tests/vectors/generate.py [DIRECTORY]`.

It follows docs/wire-format.md and imports nothing of Veilhead, so that the vectors hold the
packages against the specification and not against themselves. Everything is fixed: what would be
random in a real message (secrets, errors, seeds, masks, floods) comes from SHAKE-256 of a label.
For that reason nothing here may be copied into a client.
"""

from __future__ import annotations

import cmath
import hashlib
import itertools
import json
import math
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

Polynomial = list[int]

KEY, QUERY, REPLY, QUERY_WITH_KEY = 1, 2, 3, 4
BLAKE2XB, SHAKE256 = 1, 2
COEFFICIENT, NTT = 0, 1


# --- fixed values in the place of random ones ----------------------------------------------------


def fixed_bytes(label: str, count: int) -> bytes:
    return hashlib.shake_256(f"veilhead vectors/{label}".encode()).digest(count)


def fixed_integers(label: str, count: int, bound: int) -> list[int]:
    """Integers in [0, bound); the bias of the reduction does not matter here."""
    data = fixed_bytes(label, 16 * count)
    return [int.from_bytes(data[16 * i : 16 * i + 16], "little") % bound for i in range(count)]


def fixed_ternary(label: str, count: int) -> Polynomial:
    return [value - 1 for value in fixed_integers(label, count, 3)]


def fixed_errors(label: str, count: int) -> Polynomial:
    """Differences of two sums of 21 fair bits: the error of the standard encryption."""
    return [
        (value & 0x1FFFFF).bit_count() - (value >> 21).bit_count()
        for value in fixed_integers(label, count, 1 << 42)
    ]


# --- parameter sets ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    name: str
    degree: int
    prime: int
    hints: int

    @property
    def width(self) -> int:
        return self.prime.bit_length()

    @property
    def canonical_form(self) -> bytes:
        return (
            f"veilhead-parameters 2\nscheme=ckks\ndegree={self.degree}\nprime={self.prime:#x}\n"
            "secret=ternary\nerror=cbd21\n"
        ).encode()

    @property
    def id(self) -> bytes:
        return hashlib.sha256(self.canonical_form).digest()


STANDARD = Parameters("standard", 4096, 0x1FFFFFFFFB4001, 2900)
COMPACT = Parameters("compact", 2048, 0x3FFFFFFFFC001, 1152)


# --- layouts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What of a head decides its layouts."""

    parameters: Parameters
    dimensions: int
    classes: int
    served_exponent: int
    group_limit: int

    @property
    def most_wanted(self) -> int:
        return self.parameters.hints // (self.served_exponent + 11)


@dataclass(frozen=True)
class Shape:
    """A layout but for the head's own numbers."""

    kind: int
    block_length: int
    pieces: int
    group: int
    replies: int

    @property
    def products(self) -> int:
        return self.pieces * self.replies

    @property
    def cost(self) -> int:
        return 20 * self.pieces + 20 * self.replies + self.products


def shape_of(head: Head, texts: int) -> Shape | None:
    """The cheapest layout of so many texts, where there is one."""
    degree, most = head.parameters.degree, head.most_wanted
    bulk = texts > most
    if texts * head.classes > 2**20:
        return None
    shapes = []
    for group in range(1, 2 if bulk else min(head.group_limit, most // texts, head.classes) + 1):
        if texts * group > degree:
            continue
        pieces = -(-head.dimensions // (degree // (texts * group)))
        if pieces > 1024:
            continue
        shapes.append(
            Shape(
                kind=3 if bulk else 1 if texts == 1 else 2,
                block_length=-(-head.dimensions // pieces),
                pieces=pieces,
                group=group,
                replies=-(-head.classes // group),
            )
        )
    return min(shapes, key=lambda shape: (shape.cost, shape.group), default=None)


def block_sizes(head: Head) -> list[int]:
    """The numbers of texts that a block may have."""
    sizes, left = [], 4096
    powers = [2**bits for bits in range(1, 13) if 2**bits <= head.most_wanted]
    for texts in powers:
        shape = shape_of(head, texts)
        if shape is None or left - shape.products < 2048:
            break
        sizes.append(texts)
        left -= shape.products
    each = {}  # cost of a text
    for texts in range(2, head.most_wanted + 1):
        shape = shape_of(head, texts)
        if shape is not None:
            each[texts] = Fraction(shape.cost + 40, texts)
            if shape.products > left and texts not in sizes:
                del each[texts]
    last = sizes[-1] if sizes else 1
    larger = [(cost, texts) for texts, cost in each.items() if texts > last]
    if larger and (not sizes or min(larger)[0] < each[last]):
        sizes.append(min(larger)[1])
    return sizes


# --- polynomials ---------------------------------------------------------------------------------

_LIMB_BYTES = 16  # room for products of two 53-bit residues, 4096 of them added


def _join(values: Sequence[int]) -> int:
    return int.from_bytes(b"".join(v.to_bytes(_LIMB_BYTES, "little") for v in values), "little")


def multiply(first: Polynomial, second: Polynomial, modulus: int) -> Polynomial:
    """The product modulo X^N + 1 and the modulus, by one multiplication of long integers."""
    degree = len(first)
    product = _join([v % modulus for v in first]) * _join([v % modulus for v in second])
    data = product.to_bytes(2 * degree * _LIMB_BYTES, "little")
    limbs = [
        int.from_bytes(data[i : i + _LIMB_BYTES], "little")
        for i in range(0, len(data), _LIMB_BYTES)
    ]
    return [(limbs[i] - limbs[i + degree]) % modulus for i in range(degree)]


def reverse_bits(value: int, bits: int) -> int:
    return int(format(value, f"0{bits}b")[::-1], 2)


def smallest_root(degree: int, prime: int) -> int:
    """psi: the smallest primitive 2N-th root of unity."""
    non_residue = next(x for x in range(2, prime) if pow(x, (prime - 1) // 2, prime) == prime - 1)
    root = pow(non_residue, (prime - 1) // (2 * degree), prime)
    return min(pow(root, odd, prime) for odd in range(1, 2 * degree, 2))


def to_ntt(polynomial: Polynomial, prime: int) -> Polynomial:
    """Value i is the polynomial at psi^(2 rev(i) + 1)."""
    degree = len(polynomial)
    bits = degree.bit_length() - 1
    psi = smallest_root(degree, prime)
    powers = [1] * degree
    for i in range(1, degree):
        powers[i] = powers[i - 1] * psi % prime
    values = [v % prime for v in polynomial]
    half, blocks = degree // 2, 1
    while half:
        for block in range(blocks):
            factor = powers[reverse_bits(blocks + block, bits)]
            start = 2 * block * half
            for i in range(start, start + half):
                low, high = values[i], values[i + half] * factor % prime
                values[i], values[i + half] = (low + high) % prime, (low - high) % prime
        half, blocks = half // 2, 2 * blocks
    return values


# --- expansion of a seed -------------------------------------------------------------------------

_BLOCK_BYTES = 4096

_BLAKE2B_IV = (
    0x6A09E667F3BCC908,
    0xBB67AE8584CAA73B,
    0x3C6EF372FE94F82B,
    0xA54FF53A5F1D36F1,
    0x510E527FADE682D1,
    0x9B05688C2B3E6C1F,
    0x1F83D9ABFB41BD6B,
    0x5BE0CD19137E2179,
)
_BLAKE2B_SIGMA = (
    "0123456789abcdef",
    "ea489fd61c02b753",
    "b8c052fdae367194",
    "7931dcbe265a40f8",
    "905724afe1bc683d",
    "2c6a0b834d75fe19",
    "c51fed4a0763928b",
    "db7ec13950f4862a",
    "6fe9b308c2d714a5",
    "a2847615fb9e3cd0",
    "0123456789abcdef",
    "ea489fd61c02b753",
)


def _blake2b_leaves(root: bytes) -> bytes:
    """The 64 output nodes of BLAKE2Xb, 64 bytes each, side by side in numpy arrays.

    hashlib refuses their depth of 0. A node's parameter block: digest length 64, key length 0,
    fanout 0, depth 0, leaf length 64, node offset i, output length 4096, node depth 0, inner
    length 64; its message is the root's 64 bytes.
    """
    nodes = _BLOCK_BYTES // 64
    message = [np.uint64(word) for word in struct.unpack("<16Q", root.ljust(128, b"\0"))]
    blocks = [
        struct.unpack("<8Q", struct.pack("<BBBBIIIBB46x", 64, 0, 0, 0, 64, i, _BLOCK_BYTES, 0, 64))
        for i in range(nodes)
    ]
    initial = [
        np.array([_BLAKE2B_IV[word] ^ block[word] for block in blocks], dtype=np.uint64)
        for word in range(8)
    ]
    state = initial + [np.full(nodes, word, dtype=np.uint64) for word in _BLAKE2B_IV]
    state[12] = state[12] ^ np.uint64(64)  # bytes hashed so far
    state[14] = ~state[14]  # the last block

    def rotate(value: Any, by: int) -> Any:
        return (value >> np.uint64(by)) | (value << np.uint64(64 - by))

    columns = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
    diagonals = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
    for row in _BLAKE2B_SIGMA:
        order = [int(digit, 16) for digit in row]
        for step, (a, b, c, d) in enumerate(columns + diagonals):
            state[a] = state[a] + state[b] + message[order[2 * step]]
            state[d] = rotate(state[d] ^ state[a], 32)
            state[c] = state[c] + state[d]
            state[b] = rotate(state[b] ^ state[c], 24)
            state[a] = state[a] + state[b] + message[order[2 * step + 1]]
            state[d] = rotate(state[d] ^ state[a], 16)
            state[c] = state[c] + state[d]
            state[b] = rotate(state[b] ^ state[c], 63)
    words = [initial[i] ^ state[i] ^ state[i + 8] for i in range(8)]
    return np.stack(words, axis=1).astype("<u8").tobytes()


def blake2xb_block(seed: bytes, counter: int) -> bytes:
    """Block `counter`: BLAKE2Xb of the counter, keyed with the seed, 4096 bytes."""
    root = hashlib.blake2b(
        struct.pack("<Q", counter),
        key=seed,
        digest_size=64,
        fanout=1,
        depth=1,
        node_offset=_BLOCK_BYTES << 32,  # BLAKE2X keeps the output's length there
    ).digest()
    return _blake2b_leaves(root)


def shake256_block(seed: bytes, counter: int) -> bytes:
    """Block `counter`: SHAKE256 of the seed and the counter, 4096 bytes."""
    return hashlib.shake_256(seed + struct.pack("<Q", counter)).digest(_BLOCK_BYTES)


_BLOCKS: dict[int, Callable[[bytes, int], bytes]] = {
    BLAKE2XB: blake2xb_block,
    SHAKE256: shake256_block,
}


def expand(prng: int, seed: bytes, degree: int, prime: int) -> tuple[Polynomial, int]:
    """Residues [N], and how many words had to be drawn again."""

    def words() -> Iterator[int]:
        counter = 0
        while True:
            yield from struct.unpack(f"<{_BLOCK_BYTES // 8}Q", _BLOCKS[prng](seed, counter))
            counter += 1

    source = words()
    largest = 2**64 - 1
    bound = largest - largest % prime - 1
    residues, redrawn = [], 0
    for word in [next(source) for _ in range(degree)]:
        accepted = word
        while accepted >= bound:
            accepted = next(source)
            redrawn += 1
        residues.append(accepted % prime)
    return residues, redrawn


# --- messages ------------------------------------------------------------------------------------


def pack_bits(values: Sequence[int], width: int) -> bytes:
    joined = 0
    for position, value in enumerate(values):
        joined |= value << (position * width)
    return joined.to_bytes(-(-len(values) * width // 8), "little")


def prefix(kind: int, prng: int, domain: int, parameters: Parameters) -> bytes:
    return struct.pack("<4sBBBB32s", b"VEIL", 2, kind, prng, domain, parameters.id)


@dataclass(frozen=True)
class Case:
    """One model, one key, one query and one reply; `exponent` is e, `downscale_bits` k."""

    name: str
    parameters: Parameters
    prng: int
    domain: int
    dimensions: int
    labels: tuple[str, ...]
    exponent: int
    weight_scale_bits: int
    group_limit: int
    downscale_bits: int = 0
    backbone: bool = False
    bulk: bool = False
    texts: int = 1
    carries_key: bool = False  # also as a query that carries its key

    @property
    def served_exponent(self) -> int:
        return self.exponent - self.downscale_bits

    @property
    def scale_bits(self) -> int:
        return self.parameters.width - 1 - self.served_exponent

    @property
    def reply_bits(self) -> int:
        return self.served_exponent + 21

    @property
    def query_scale_bits(self) -> int:
        return self.scale_bits - self.weight_scale_bits

    @property
    def head(self) -> Head:
        return Head(
            self.parameters,
            self.dimensions,
            len(self.labels),
            self.served_exponent,
            self.group_limit,
        )

    @property
    def shape(self) -> Shape:
        shape = shape_of(self.head, self.texts)
        assert shape is not None
        assert shape.kind != 2 or self.texts in block_sizes(self.head)
        assert shape.kind != 3 or self.bulk
        return shape

    @property
    def pieces(self) -> int:
        return self.shape.pieces

    @property
    def block(self) -> int:
        return self.shape.block_length

    @property
    def group(self) -> int:
        return self.shape.group

    @property
    def replies(self) -> int:
        return self.shape.replies

    def counts(self, polynomials: int) -> bytes:
        return struct.pack(
            "<B3xIIIIIII",
            self.shape.kind,
            self.texts,
            self.dimensions,
            len(self.labels),
            self.block,
            self.pieces,
            self.group,
            polynomials,
        )

    def manifest(self) -> dict[str, Any]:
        *files, tokenizer, graph = (
            {"path": path, "bytes": size, "sha256": hashlib.sha256(path.encode()).hexdigest()}
            for path, size in (
                ("config.json", 612),
                ("weights/model.safetensors", 90868376),
                ("onnx/tokenizer.json", 466268),
                ("onnx/model.fp16.onnx", 45178348),
            )
        )
        backbone = {
            "kind": "transformers",
            "name": "example/sentence-encoder",
            "pooling": "mean",
            "split": None,
            "dense": [],
            "normalise": True,
            "max_tokens": 256,
            "token_types": False,
            "public_parameters": 22713216,
            "files": files,
            "onnx": {"tokenizer": tokenizer, "fp32": None, "fp16": graph},
        }
        return {
            "format": "veilhead-manifest/2",
            "name": self.name,
            "task": "text-classification",
            "parameters": self.parameters.name,
            "parameters_id": self.parameters.id.hex(),
            "head": {
                "dimensions": self.dimensions,
                "labels": list(self.labels),
                "problem_type": "single_label",
                "private_parameters": len(self.labels) * (self.dimensions + 1),
                "exponent": self.exponent,
                "downscale_bits": self.downscale_bits,
                "scale_bits": self.scale_bits,
                "weight_scale_bits": self.weight_scale_bits,
                "group_limit": self.group_limit,
                "flood_bits": self.scale_bits - 11,
                "reply_bits": self.reply_bits,
                "error_bound": 18 * 2.0 ** (self.downscale_bits - 14),
                "commitment": hashlib.sha256(self.name.encode()).hexdigest(),
            },
            "embedding": {
                "scale": 1.0 if self.backbone else 2.5,
                "scale_origin": "normalised" if self.backbone else "given",
                "calibration": None,
            },
            "backbone": backbone if self.backbone else None,
            "policy": {"minimum_parameters": self.parameters.name, "bulk": self.bulk},
            "about": {"language": "en", "note": "größer als 1", "rows": [1, 2.5, None, True]},
        }

    # The numbers below are integers: embedding k_j / 2^20, weight v / 2^weight_scale_bits. Weights
    # and biases are those that are served: the head's own are 2^k times as large.

    def embeddings(self) -> list[list[int]]:
        count = self.texts * self.dimensions
        flat = [v - 2**14 for v in fixed_integers(f"{self.name}/embedding", count, 2**15 + 1)]
        return [flat[i : i + self.dimensions] for i in range(0, count, self.dimensions)]

    def weight(self) -> list[list[int]]:
        count = len(self.labels) * self.dimensions
        flat = [v - 2**8 for v in fixed_integers(f"{self.name}/weight", count, 2**9 + 1)]
        return [flat[i : i + self.dimensions] for i in range(0, count, self.dimensions)]

    def bias(self) -> list[int]:
        """In units of 2^-20."""
        return [v - 2**19 for v in fixed_integers(f"{self.name}/bias", len(self.labels), 2**20)]


CASES = (
    Case(
        name="compact-384",
        parameters=COMPACT,
        prng=SHAKE256,
        domain=COEFFICIENT,
        dimensions=384,
        labels=("I", "II", 'said "so"', "Ärzte", "心", "VI", "VII"),
        exponent=1,
        weight_scale_bits=14,
        group_limit=64,
        backbone=True,
        carries_key=True,
    ),
    Case(
        name="compact-3000",
        parameters=COMPACT,
        prng=BLAKE2XB,
        domain=COEFFICIENT,
        dimensions=3000,
        labels=("no", "yes"),
        exponent=10,
        downscale_bits=4,
        weight_scale_bits=15,
        group_limit=1,
    ),
    Case(
        name="standard-384",
        parameters=STANDARD,
        prng=BLAKE2XB,
        domain=NTT,
        dimensions=384,
        labels=tuple(f"class {number}" for number in range(40)),
        exponent=0,
        weight_scale_bits=14,
        group_limit=256,
    ),
    Case(
        name="compact-block",
        parameters=COMPACT,
        prng=BLAKE2XB,
        domain=NTT,
        dimensions=48,
        labels=("a", "b", "c", "d", "e"),
        exponent=3,
        weight_scale_bits=13,
        group_limit=64,
        texts=16,
    ),
    Case(
        name="compact-bulk",
        parameters=COMPACT,
        prng=SHAKE256,
        domain=NTT,
        dimensions=12,
        labels=("a", "b"),
        exponent=9,
        downscale_bits=7,
        weight_scale_bits=13,
        group_limit=32,
        bulk=True,
        texts=100,
    ),
)


def canonical(document: Any) -> bytes:
    return json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def encrypt(
    case: Case, label: str, secret: Polynomial, plaintext: Polynomial
) -> tuple[bytes, bytes, Polynomial]:
    """(packed c0, seed, residues of c0): c0 = -(a s + e) + m, a from the seed, in case.domain."""
    degree, prime = case.parameters.degree, case.parameters.prime
    seed = fixed_bytes(f"{case.name}/{label}/seed", 64)
    mask, _ = expand(case.prng, seed, degree, prime)
    error = fixed_errors(f"{case.name}/{label}/error", degree)
    added = [m - e for m, e in zip(plaintext, error, strict=True)]
    if case.domain == NTT:
        s, m = to_ntt(secret, prime), to_ntt(added, prime)
        residues = [(m[i] - mask[i] * s[i]) % prime for i in range(degree)]
    else:
        product = multiply(mask, secret, prime)
        residues = [(added[i] - product[i]) % prime for i in range(degree)]
    return pack_bits(residues, case.parameters.width), seed, residues


def words_digest(residues: Polynomial) -> str:
    """SHA-256 of the residues as little-endian 64-bit words."""
    return hashlib.sha256(struct.pack(f"<{len(residues)}Q", *residues)).hexdigest()


def truncated(value: int, modulus: int, bits: int) -> int:
    return ((value << (bits + 1)) + modulus) // (2 * modulus) % (1 << bits)


def describe(data: bytes) -> dict[str, Any]:
    return {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "leading": data[:48].hex(),
    }


def build_case(case: Case, files: dict[str, bytes]) -> dict[str, Any]:
    """Write a case's four files and return what they must be read as."""
    parameters, degree = case.parameters, case.parameters.degree
    modulus, delta = parameters.prime, 1 << case.scale_bits
    manifest = canonical(case.manifest())
    digest = hashlib.sha256(manifest).digest()
    secret = fixed_ternary(f"{case.name}/secret", degree)

    body, key_seed, b = encrypt(case, "key", secret, [0] * degree)
    key = prefix(KEY, case.prng, case.domain, parameters) + body + key_seed
    key_id = hashlib.sha256(key).digest()

    embeddings = case.embeddings()
    scaled = [[0] * degree for _ in range(case.pieces)]
    for text, row in enumerate(embeddings):
        for feature, value in enumerate(row):
            piece, place = divmod(feature, case.block)
            at = text * case.group * case.block + place
            scaled[piece][at] = value << (case.query_scale_bits - 20)
    target = digest + key_id + case.counts(case.pieces)
    pieces, polynomials = b"", []
    for piece in range(case.pieces):
        packed, seed, c0 = encrypt(case, f"query {piece}", secret, scaled[piece])
        pieces += packed + seed
        polynomials.append({"seed": seed.hex(), "c0_sha256": words_digest(c0)})

    query = prefix(QUERY, case.prng, case.domain, parameters) + target + pieces
    # A client would make a key for this query alone: for a vector the same one will do.
    with_key = prefix(QUERY_WITH_KEY, case.prng, case.domain, parameters) + target + key + pieces

    # A reply as it comes out of the evaluation: an encryption of W x + b plus flood and noise.
    weight, bias, count = case.weight(), case.bias(), len(case.labels)
    logits = [
        Fraction(sum(w * k for w, k in zip(row, embedding, strict=True)), 1 << 34)
        * Fraction(1 << 14, 1 << case.weight_scale_bits)
        + Fraction(offset, 1 << 20)
        for embedding in embeddings
        for row, offset in zip(weight, bias, strict=True)
    ]  # text by text
    flood = fixed_integers(f"{case.name}/flood", len(logits), 2 * (delta >> 11))
    noise = fixed_integers(f"{case.name}/noise", len(logits), 1 << 27)
    reply = prefix(REPLY, 0, 0, parameters) + digest + key_id + case.counts(case.replies)
    reply += struct.pack("<I32s", case.reply_bits, hashlib.sha256(query).digest())
    answers, decrypted = [], [0] * len(logits)
    for number in range(case.replies):
        classes = range(number * case.group, min((number + 1) * case.group, count))
        mask = fixed_integers(f"{case.name}/reply {number}/mask", degree, modulus)
        product = multiply(mask, secret, modulus)
        c1 = [truncated(value, modulus, case.reply_bits) for value in mask]
        c0 = []
        for text, row in itertools.product(range(case.texts), range(len(classes))):
            index = text * count + classes[row]
            added = flood[index] - (delta >> 11) + noise[index] - (1 << 26)
            value = int(logits[index] * delta) + added
            at = (text * case.group + row) * case.block + case.block - 1
            c0.append(truncated((value - product[at]) % modulus, modulus, case.reply_bits))
            # What a client computes: c0 plus a coefficient of c1 s, modulo 2^kappa, centred.
            inner = c0[-1] + sum(
                secret[j] * (c1[at - j] if j <= at else -c1[at - j + degree]) for j in range(degree)
            )
            half = 1 << (case.reply_bits - 1)
            decrypted[index] = (inner + half) % (2 * half) - half
        reply += pack_bits(c0, case.reply_bits) + pack_bits(c1, case.reply_bits)
        answers.append({"c0": c0, "c1_sha256": words_digest(c1)})
    rounded = []
    for value in decrypted:
        exact = Fraction(value * modulus, 1 << (case.reply_bits + case.scale_bits))
        # As it is served, rounded first; then multiplied.
        rounded.append(round(exact * 4096) / 4096 * 2**case.downscale_bits)

    files[f"{case.name}.manifest.json"] = manifest
    files[f"{case.name}.key.bin"] = key
    files[f"{case.name}.query.bin"] = query
    files[f"{case.name}.reply.bin"] = reply
    if case.carries_key:
        files[f"{case.name}.query-with-key.bin"] = with_key
    return {
        "name": case.name,
        "parameters": parameters.name,
        "prng": case.prng,
        "domain": case.domain,
        "layout": {
            "kind": case.shape.kind,
            "texts": case.texts,
            "dimensions": case.dimensions,
            "classes": count,
            "block_length": case.block,
            "pieces": case.pieces,
            "replies": case.replies,
            "group": case.group,
        },
        "block_sizes": block_sizes(case.head),
        "scales": {
            "exponent": case.exponent,
            "downscale_bits": case.downscale_bits,
            "scale_bits": case.scale_bits,
            "weight_scale_bits": case.weight_scale_bits,
            "query_scale_bits": case.query_scale_bits,
            "reply_bits": case.reply_bits,
            "group_limit": case.group_limit,
        },
        "secret_plus_one": "".join(str(value + 1) for value in secret),
        "embeddings_times_2_20": embeddings,
        "manifest": describe(manifest),
        "key": describe(key) | {"seed": key_seed.hex(), "b_sha256": words_digest(b)},
        "query": describe(query) | {"polynomials": polynomials},
        "query_with_key": describe(with_key) if case.carries_key else None,
        "reply": describe(reply) | {"polynomials": answers},
        "plaintext_logits": [round(float(value * 2**case.downscale_bits), 9) for value in logits],
        "decrypted": decrypted,
        "rounded_logits": rounded,
    }


# --- vectors that must fail ----------------------------------------------------------------------


Add = Callable[..., None]


def write(at: int, data: bytes) -> dict[str, Any]:
    return {"at": at, "hex": data.hex()}


def u32(at: int, value: int) -> dict[str, Any]:
    return write(at, struct.pack("<I", value))


OTHER_DIGEST = hashlib.sha256(b"another").digest()

COUNTS = ("texts", "dimensions", "classes", "block length", "pieces", "group", "polynomials")


def failing_headers(add: Add, case: Case, kind: str, data: bytes) -> None:
    """Lengths and headers of a key, a query or a reply."""
    base = f"{case.name}.{kind}.bin"
    header = {"key": 40, "query": 136, "reply": 172}[kind]
    add("empty", base, "MessageLengthError", {"truncate": len(data)})
    add("half a header", base, "MessageLengthError", {"truncate": len(data) - header // 2})
    add("a header only", base, "MessageLengthError", {"truncate": len(data) - header})
    add("a byte short", base, "MessageLengthError", {"truncate": 1})
    add("a byte long", base, "MessageLengthError", {"append": "00"})
    add("64 bytes long", base, "MessageLengthError", {"append": "00" * 64})
    add("other magic", base, "MessageTypeError", write(0, b"VEIM"))
    for version in (0, 1, 3):
        add(f"version {version}", base, "FormatVersionError", write(4, bytes([version])))
    for value in sorted({0, 1, 2, 3, 4, 5, 255} - {data[5]}):
        # A query that says that it carries a key is too short for one.
        error = "MessageLengthError" if (kind, value) == ("query", 4) else "MessageTypeError"
        add(f"type {value}", base, error, write(5, bytes([value])))
    add("unknown parameters", base, "ParameterMismatchError", write(8, OTHER_DIGEST))
    foreign = (STANDARD if case.parameters is COMPACT else COMPACT).id
    # Of the other set, such a key has the wrong length.
    error = "MessageLengthError" if kind == "key" else "ParameterMismatchError"
    add("other parameters", base, error, write(8, foreign))
    if kind == "reply":
        add("a PRNG", base, "PaddingError", write(6, b"\1"))
        add("a domain", base, "PaddingError", write(7, b"\1"))
    else:
        add("PRNG 0", base, "PrngError", write(6, b"\0"))
        add("PRNG 3", base, "PrngError", write(6, b"\3"))
        add("domain 2", base, "DomainError", write(7, b"\2"))


def failing_counts(add: Add, case: Case, kind: str, data: bytes) -> None:
    """What a query or a reply states of its layout."""
    base = f"{case.name}.{kind}.bin"
    for value in sorted({0, 1, 2, 3, 4} - {data[104]}):
        add(f"layout {value}", base, "MessageLayoutError", write(104, bytes([value])))
    for at in (105, 106, 107):
        add(f"reserved byte {at}", base, "PaddingError", write(at, b"\1"))
    for at, field in enumerate(COUNTS):
        offset = 108 + 4 * at
        (value,) = struct.unpack_from("<I", data, offset)
        if (kind, field, case.shape.kind) != ("query", "texts", 3):
            # A text more of bulk happens to have the same counts otherwise.
            add(f"{field} more", base, "MessageLayoutError", u32(offset, value + 1))
        add(f"{field} 0", base, "MessageLayoutError", u32(offset, 0))
        add(f"{field} 2^32 - 1", base, "MessageLayoutError", u32(offset, 2**32 - 1))
    if kind == "query" and case.shape.kind == 2:
        # Within the limit of hints, and no block size.
        for texts in sorted({3, 5, 15, 17, 63, 65, case.head.most_wanted - 1}):
            assert texts not in block_sizes(case.head)
            add(f"{texts} texts", base, "MessageLayoutError", u32(108, texts))


def failing_bodies(add: Add, case: Case, kind: str, data: bytes) -> None:
    """Residues and seeds of a key or a query."""
    base = f"{case.name}.{kind}.bin"
    header = {"key": 40, "query": 136}[kind]
    width = case.parameters.width
    body = case.parameters.degree * width // 8
    for where, value in (("first", case.parameters.prime), ("last", 2**width - 1)):
        start = header if where == "first" else header + body - 8
        shift = 0 if where == "first" else 64 - width
        mask = (2**width - 1) << shift
        window = int.from_bytes(data[start : start + 8], "little")
        window = window & ~mask | value << shift
        add(
            f"{where} residue is {value:#x}",
            base,
            "ResidueRangeError",
            write(start, window.to_bytes(8, "little")),
        )
    add("all residues zero", base, "ZeroPolynomialError", {"fill": [header, header + body, 0]})
    if kind == "query" and case.pieces > 1:
        add(
            "one seed twice",
            base,
            "SeedReuseError",
            {"copy": [header + body, header + 2 * body + 64, 64]},
        )


def failing_targets(add: Add, case: Case, files: dict[str, bytes]) -> None:
    """What query and reply are of, and how a reply's residues end."""
    query, reply = f"{case.name}.query.bin", f"{case.name}.reply.bin"
    body = case.parameters.degree * case.parameters.width // 8
    key_seed = files[f"{case.name}.key.bin"][-64:]
    add("the key's seed", query, "SeedReuseError", write(136 + body, key_seed))
    for base in (query, reply):
        add("another model", base, "ModelMismatchError", write(40, OTHER_DIGEST))
        add("another key", base, "KeyMismatchError", write(72, OTHER_DIGEST))
    for value in (0, case.reply_bits - 1, case.reply_bits + 1, 2**32 - 1):
        add(f"kappa {value}", reply, "MessageLayoutError", u32(136, value))
    add("another query", reply, "QueryMismatchError", write(140, OTHER_DIGEST))
    wanted = case.texts * min(case.group, len(case.labels))
    used = wanted * case.reply_bits % 8
    at = 172 + -(-wanted * case.reply_bits // 8) - 1
    for bit in (used, 7) if used else ():
        set_bit = bytes([files[reply][at] | 1 << bit])
        add(f"padding bit {bit}", reply, "PaddingError", write(at, set_bit))


def failing_carried_keys(add: Add, case: Case, files: dict[str, bytes]) -> None:
    """A query that carries its key: the key's length, digest, contents and seed."""
    base = f"{case.name}.query-with-key.bin"
    data, key = files[base], files[f"{case.name}.key.bin"]
    end = 136 + len(key)
    # Whoever changes a key has to state its digest: only then is the key itself looked at.
    digest = {"sha256": [136, end, 72]}
    add("half a header", base, "MessageLengthError", {"truncate": len(data) - 68})
    add("no key", base, "MessageLengthError", {"truncate": len(data) - 136})
    add("half a key", base, "MessageLengthError", {"truncate": len(data) - 136 - len(key) // 2})
    add("a key only", base, "MessageLengthError", {"truncate": len(data) - end})
    add("a byte short", base, "MessageLengthError", {"truncate": 1})
    add("a byte long", base, "MessageLengthError", {"append": "00"})
    add("a query without a key", base, "MessageLengthError", write(5, bytes([QUERY])))
    add("a key", base, "MessageTypeError", write(5, bytes([KEY])))
    add("version 1", base, "FormatVersionError", write(4, b"\1"))
    add("another model", base, "ModelMismatchError", write(40, OTHER_DIGEST))
    add("another key digest", base, "KeyMismatchError", write(72, OTHER_DIGEST))
    add("a changed seed of the key", base, "KeyMismatchError", write(end - 64, bytes(64)))
    add("a changed residue of the key", base, "KeyMismatchError", write(176, bytes(8)))
    add("a carried query", base, "MessageTypeError", write(136 + 5, bytes([QUERY])), digest)
    add("a carried key of version 1", base, "FormatVersionError", write(136 + 4, b"\1"), digest)
    # A key of the other set is longer than the place of this one.
    add("a key of the other set", base, "MessageLengthError", write(136 + 8, STANDARD.id), digest)
    add("an unknown set", base, "ParameterMismatchError", write(136 + 8, OTHER_DIGEST), digest)
    add("a PRNG of 3", base, "PrngError", write(136 + 6, b"\3"), digest)
    add("a domain of 2", base, "DomainError", write(136 + 7, b"\2"), digest)
    add("a key of zeros", base, "ZeroPolynomialError", {"fill": [176, end - 64, 0]}, digest)
    add("a residue of the key", base, "ResidueRangeError", write(176, b"\xff" * 7), digest)
    add("the key's seed", base, "SeedReuseError", {"copy": [end - 64, len(data) - 64, 64]})
    add("a residue", base, "ResidueRangeError", write(end, b"\xff" * 7))
    add("all residues zero", base, "ZeroPolynomialError", {"fill": [end, len(data) - 64, 0]})
    add("3 texts", base, "MessageLayoutError", u32(108, 3))


def failing(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """Edits of good messages, each with the one error that they must raise.

    An edit is one of: truncate (bytes taken off the end), append (hex), at + hex (bytes written
    over), copy ([from, to, count] within the message), fill ([from, to, byte]), sha256 ([from, to,
    at]: the digest of those bytes, written there), path + value (a field of a manifest, written
    canonically again; without value it is removed).
    """
    cases: list[dict[str, Any]] = []

    def add(name: str, base: str, error: str, *edits: dict[str, Any]) -> None:
        cases.append({"base": base, "name": name, "edits": list(edits), "error": error})

    for case in CASES:
        for kind in ("key", "query", "reply"):
            if case.name == "compact-3000" and kind != "query":
                continue  # nothing that the first case does not have
            data = files[f"{case.name}.{kind}.bin"]
            failing_headers(add, case, kind, data)
            if kind != "key":
                failing_counts(add, case, kind, data)
            if kind != "reply":
                failing_bodies(add, case, kind, data)
        failing_targets(add, case, files)
        if case.carries_key:
            failing_carried_keys(add, case, files)

    base = "compact-384.manifest.json"
    manifest_edits: tuple[tuple[str, list[Any], Any], ...] = (
        ("a newer format", ["format"], "veilhead-manifest/3"),
        ("the format before", ["format"], "veilhead-manifest/1"),
        ("an unknown field", ["extra"], 1),
        ("an unknown field of the head", ["head", "norm"], 1.5),
        ("a name with a slash", ["name"], "a/b"),
        ("an unknown parameter set", ["parameters"], "tiny"),
        ("the other parameter set", ["parameters"], "standard"),
        ("a set that is gone", ["parameters"], "strong"),
        ("the id of another set", ["parameters_id"], STANDARD.id.hex()),
        ("an id in upper case", ["parameters_id"], COMPACT.id.hex().upper()),
        ("a minimum above the set", ["policy", "minimum_parameters"], "standard"),
        ("another scale", ["head", "scale_bits"], 47),
        ("another flood", ["head", "flood_bits"], 38),
        ("another kappa", ["head", "reply_bits"], 23),
        ("an exponent of 25", ["head", "exponent"], 25),
        ("an exponent of 7 that is not divided", ["head", "exponent"], 7),
        ("divided by more than the logits", ["head", "downscale_bits"], 2),
        ("divided by a fraction", ["head", "downscale_bits"], -1),
        ("without a group", ["head", "group_limit"], 0),
        ("a group that is no power of two", ["head", "group_limit"], 48),
        ("a group beyond the hints", ["head", "group_limit"], 128),
        ("a negative exponent", ["head", "exponent"], -1),
        ("a number as text", ["head", "exponent"], "1"),
        ("a number with a fraction", ["head", "dimensions"], 384.0),
        ("a truth value as a number", ["head", "exponent"], True),
        ("no dimensions", ["head", "dimensions"], 0),
        ("too many dimensions", ["head", "dimensions"], 4097),
        ("no labels", ["head", "labels"], []),
        ("a label twice", ["head", "labels"], ["a", "a"]),
        ("a control character in a label", ["head", "labels"], ["a", "\x1b[2J"]),
        ("an error bound off its grid", ["head", "error_bound"], 0.001),
        ("an error bound off its grid by half a step", ["head", "error_bound"], 2.0**-15),
        ("no error bound", ["head", "error_bound"], 0.0),
        ("a scale of zero", ["embedding", "scale"], 0.0),
        ("an unknown origin", ["embedding", "scale_origin"], "guessed"),
        ("a calibrated scale without its calibration", ["embedding", "scale_origin"], "calibrated"),
        (
            "a calibration of a scale that was not calibrated",
            ["embedding", "calibration"],
            {"rows": 100, "quantile": 0.999, "margin": 1.5},
        ),
        ("an unknown task", ["task"], "translation"),
        ("a task that is not the pooling's", ["task"], "token-classification"),
        ("a pooling that is not the task's", ["backbone", "pooling"], "tokens"),
        ("an unknown pooling", ["backbone", "pooling"], "median"),
        ("a classifier without a split", ["backbone", "pooling"], "architecture"),
        ("an encoder with a split", ["backbone", "split"], "classifier"),
        ("no public parameters", ["backbone", "public_parameters"], 0),
        (
            "a dense layer of no file",
            ["backbone", "dense"],
            [{"file": "2_Dense/model.safetensors", "activation": "tanh"}],
        ),
        (
            "an unknown activation",
            ["backbone", "dense"],
            [{"file": "weights/model.safetensors", "activation": "swish"}],
        ),
        ("an unknown problem", ["head", "problem_type"], "ranking"),
        ("a private parameter too few", ["head", "private_parameters"], 7 * 385 - 1),
        ("a path that climbs", ["backbone", "files", 0, "path"], "../config.json"),
        ("an absolute path", ["backbone", "files", 0, "path"], "/config.json"),
        ("a path with two slashes", ["backbone", "files", 0, "path"], "a//b"),
        ("a path of a dot", ["backbone", "files", 0, "path"], "."),
        ("a path with a backslash", ["backbone", "files", 0, "path"], "a\\b"),
        ("a path twice", ["backbone", "files", 0, "path"], "weights/model.safetensors"),
        ("a short digest", ["backbone", "files", 0, "sha256"], "ab"),
        ("an ONNX form without a graph", ["backbone", "onnx", "fp16"], None),
        ("an ONNX form without a tokenizer", ["backbone", "onnx", "tokenizer"], None),
        ("an ONNX path that climbs", ["backbone", "onnx", "fp16", "path"], "../model.onnx"),
        ("an ONNX path of another file", ["backbone", "onnx", "fp16", "path"], "config.json"),
    )
    for name, path, value in manifest_edits:
        add(name, base, "ManifestError", {"path": path, "value": value})
    for field in ("format", "task", "policy", "about", "backbone"):
        add(f"without {field}", base, "ManifestError", {"path": [field]})
    add("a byte short", base, "ManifestError", {"truncate": 1})
    add("a line feed at the end", base, "ManifestError", {"append": "0a"})
    add("not UTF-8", base, "ManifestError", write(2, b"\xff"))

    # What was released before is refused by name.
    for kind in ("key", "query"):
        add("as it is", f"version-1/compact-384.{kind}.bin", "FormatVersionError")
    add("as it is", "version-1/compact-384.manifest.json", "ManifestError")
    return cases


# --- the smaller vectors -------------------------------------------------------------------------

#: Number of a seed whose expansion draws a word again under `standard`, found by trying: about one
#: in 7 million does. (Under `compact` one in 34 million does: none is recorded.)
REDRAW_SEED = 4_610_583


def expansions() -> list[dict[str, Any]]:
    cases = []
    for parameters in (STANDARD, COMPACT):
        for prng in (BLAKE2XB, SHAKE256):
            seeds = [bytes(range(64))]
            if parameters is STANDARD and prng == SHAKE256:
                seeds.append(fixed_bytes(f"redraw/{REDRAW_SEED}", 64))
            for seed in seeds:
                residues, redrawn = expand(prng, seed, parameters.degree, parameters.prime)
                cases.append(
                    {
                        "parameters": parameters.name,
                        "prng": prng,
                        "seed": seed.hex(),
                        "block_0": _BLOCKS[prng](seed, 0)[:32].hex(),
                        "block_1": _BLOCKS[prng](seed, 1)[:32].hex(),
                        "redrawn": redrawn,
                        "first": [hex(value) for value in residues[:4]],
                        "last": [hex(value) for value in residues[-4:]],
                        "sha256": words_digest(residues),
                    }
                )
    return cases


def truncations() -> list[dict[str, Any]]:
    """What the service makes of residues; in double precision, which decides near-ties."""
    cases = []
    for parameters in (STANDARD, COMPACT):
        prime = parameters.prime
        for bits in (21, 24, 27):
            values = [0, 1, prime - 1, prime // 2, prime // 2 + 1]
            values += fixed_integers(f"truncate/{parameters.name}/{bits}", 16, prime)
            for odd in (1, 3, 2**bits - 1, 2**bits + 1, 2 ** (bits + 1) - 1):
                tie = odd * prime >> (bits + 1)  # the integer below the tie, and the one above
                values += [tie, tie + 1]
            cases.append(
                {
                    "parameters": parameters.name,
                    "reply_bits": bits,
                    "residues": [hex(value) for value in values],
                    "truncated": [round(v * (2.0**bits / prime)) % (1 << bits) for v in values],
                    "exact": [truncated(value, prime, bits) for value in values],
                }
            )
    return cases


def encodings() -> list[dict[str, Any]]:
    """Slot i holds the polynomial at zeta^(3^i mod 2N), zeta = exp(i pi / N)."""
    cases = []
    for parameters in (STANDARD, COMPACT):
        degree = parameters.degree
        slots = [0, 1, 2, 3, 100, degree // 2 - 1]
        powers = [pow(3, slot, 2 * degree) for slot in slots]
        for coefficients in (
            {0: 1.0},
            {1: 1.0},
            {0: 0.5, 1: -0.25, 383: 1.0, degree // 2: -3.0, degree - 1: 0.125},
        ):
            values = [
                sum(
                    value * cmath.exp(1j * math.pi * (power * at % (2 * degree)) / degree)
                    for at, value in coefficients.items()
                )
                for power in powers
            ]
            cases.append(
                {
                    "degree": degree,
                    "coefficients": [[at, value] for at, value in coefficients.items()],
                    "slots": slots,
                    "powers": powers,
                    # + 0.0: no negative zeros
                    "values": [[round(v.real, 9) + 0.0, round(v.imag, 9) + 0.0] for v in values],
                }
            )
    return cases


def parameter_sets() -> list[dict[str, Any]]:
    return [
        {
            "name": parameters.name,
            "degree": parameters.degree,
            "prime": hex(parameters.prime),
            "hints": parameters.hints,
            "canonical_form": parameters.canonical_form.decode(),
            "id": parameters.id.hex(),
            "psi": hex(smallest_root(parameters.degree, parameters.prime)),
        }
        for parameters in (STANDARD, COMPACT)
    ]


def pretty(document: Any) -> bytes:
    """One entry a line, so that a change can be read."""
    lines = ",\n".join(json.dumps(entry, ensure_ascii=True) for entry in document)
    return f"[\n{lines}\n]\n".encode()


def build() -> dict[str, bytes]:
    """Every file of the vectors, by name."""
    files: dict[str, bytes] = {}
    files["messages.json"] = pretty([build_case(case, files) for case in CASES])
    files["failing.json"] = pretty(failing(files))
    files["seed-expansion.json"] = pretty(expansions())
    files["truncation.json"] = pretty(truncations())
    files["encoding.json"] = pretty(encodings())
    files["parameters.json"] = pretty(parameter_sets())
    return files


def main(directory: Path) -> None:
    for name, data in build().items():
        (directory / name).write_bytes(data)
        print(f"{len(data):8,} {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
