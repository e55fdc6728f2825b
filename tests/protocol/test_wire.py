"""Bit packing and messages: round trips, and any damage is named or seen."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veilhead_protocol.errors import (
    KeyMismatchError,
    MessageLengthError,
    PaddingError,
    ResidueRangeError,
    SeedReuseError,
    WireError,
    ZeroPolynomialError,
)
from veilhead_protocol.layout import HeadShape, Layout
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.parameters import COMPACT, PARAMETER_SETS, STANDARD, ParameterSet
from veilhead_protocol.wire import (
    MAX_KEY_BYTES,
    MAX_QUERY_BYTES,
    Domain,
    KeyMessage,
    Prng,
    QueryHeader,
    QueryMessage,
    ReplyMessage,
    ReplyPolynomial,
    SeededPolynomial,
    carried_key,
    key_id,
    pack_bits,
    packed_bytes,
    unpack_bits,
)

VECTORS = Path(__file__).resolve().parent.parent / "vectors"
WIDTHS = st.integers(8, 56)


def random_words(seed: int, count: int, width: int) -> Any:
    return np.random.default_rng(seed).integers(0, 1 << width, size=count, dtype=np.uint64)


# --- bit packing ---------------------------------------------------------------------------------


@given(WIDTHS, st.integers(1, 200), st.integers(0, 2**32))
def test_packing_is_one_long_little_endian_integer(width: int, count: int, seed: int) -> None:
    values = random_words(seed, count, width)
    joined = sum(int(value) << (width * i) for i, value in enumerate(values))
    packed = pack_bits(values, width)
    assert packed == joined.to_bytes(-(-count * width // 8), "little")
    assert len(packed) == packed_bytes(count, width)
    assert np.array_equal(unpack_bits(packed, count, width), values)


@given(WIDTHS, st.integers(1, 40))
def test_extreme_values_survive(width: int, count: int) -> None:
    for value in (0, (1 << width) - 1):
        values = np.full(count, value, dtype=np.uint64)
        assert np.array_equal(unpack_bits(pack_bits(values, width), count, width), values)


@given(WIDTHS, st.integers(1, 40), st.integers(0, 7))
def test_padding_bits_must_be_zero(width: int, count: int, bit: int) -> None:
    packed = bytearray(pack_bits(np.zeros(count, dtype=np.uint64), width))
    used = count * width % 8
    packed[-1] |= 1 << bit
    if used and bit >= used:
        with pytest.raises(PaddingError):
            unpack_bits(bytes(packed), count, width)
    else:
        values = unpack_bits(bytes(packed), count, width)
        assert values[-1] != 0
        assert pack_bits(values, width) == packed


@given(WIDTHS, st.integers(1, 40), st.integers(-3, 3).filter(bool))
def test_packed_bytes_have_one_length(width: int, count: int, difference: int) -> None:
    length = max(0, packed_bytes(count, width) + difference)
    with pytest.raises(MessageLengthError):
        unpack_bits(bytes(length), count, width)


# --- round trips ---------------------------------------------------------------------------------


def residues(seed: int, parameters: ParameterSet) -> Any:
    rng = np.random.default_rng(seed)
    return rng.integers(0, parameters.prime, size=parameters.poly_modulus_degree, dtype=np.uint64)


def layout_of(parameters: ParameterSet, dimensions: int, classes: int, exponent: int) -> Layout:
    return Layout.canonical(HeadShape(parameters, dimensions, classes, exponent, 16), 1)


SETS = st.sampled_from(list(PARAMETER_SETS.values()))
PRNGS = st.sampled_from([Prng.BLAKE2XB, Prng.SHAKE256])
DOMAINS = st.sampled_from(list(Domain))
DIGESTS = st.binary(min_size=32, max_size=32)
SEEDS = st.binary(min_size=64, max_size=64)
SEED = b"\xff" * 64  # of no polynomial
DIMENSIONS, CLASSES = st.integers(1, 4096), st.integers(1, 60)


def same(first: Any, second: Any) -> bool:
    return bool(np.array_equal(first, second))


@given(SETS, PRNGS, DOMAINS, SEEDS, st.integers(0, 2**32))
def test_keys_round_trip(
    parameters: ParameterSet, prng: Prng, domain: Domain, seed: bytes, random: int
) -> None:
    b = residues(random, parameters)
    data = KeyMessage(parameters, prng, domain, b, seed).serialize()
    assert len(data) == KeyMessage.size(parameters) <= MAX_KEY_BYTES
    found = KeyMessage.deserialize(data)
    assert (found.parameters, found.prng, found.domain, found.seed) == (
        parameters,
        prng,
        domain,
        seed,
    )
    assert same(found.b, b)


@given(
    SETS,
    PRNGS,
    DOMAINS,
    DIGESTS,
    DIGESTS,
    st.integers(0, 2**32),
    DIMENSIONS,
    CLASSES,
    st.booleans(),
)
def test_queries_round_trip(
    parameters: ParameterSet,
    prng: Prng,
    domain: Domain,
    model_digest: bytes,
    of_key: bytes,
    random: int,
    dimensions: int,
    classes: int,
    has_key: bool,
) -> None:
    layout = layout_of(parameters, dimensions, classes, 4)
    polynomials = tuple(
        SeededPolynomial(residues(random + piece, parameters), bytes([piece]) * 64)
        for piece in range(layout.pieces)
    )
    key = b""
    if has_key:
        # Its own PRNG and domain need not be those of the query.
        key = KeyMessage(
            parameters, Prng.SHAKE256, Domain.NTT, residues(random - 1 + 2**33, parameters), SEED
        ).serialize()
        of_key = key_id(key)
    message = QueryMessage(parameters, model_digest, of_key, layout, prng, domain, polynomials, key)
    data = message.serialize()
    expected = QueryMessage.size(parameters, layout, has_key=has_key)
    assert len(data) == expected <= MAX_QUERY_BYTES
    found = QueryMessage.deserialize(data, parameters, layout)
    assert replace(found, polynomials=()) == replace(message, polynomials=())
    for mine, theirs in zip(found.polynomials, polynomials, strict=True):
        assert mine.seed == theirs.seed
        assert same(mine.c0, theirs.c0)
    header = QueryHeader.deserialize(data[:136])  # routing needs no more
    assert (header.model_digest, header.key_id) == (model_digest, of_key)
    assert header.has_key is has_key
    assert carried_key(data, header) == key


@given(
    SETS, DIGESTS, DIGESTS, DIGESTS, st.integers(0, 6), st.integers(0, 2**32), DIMENSIONS, CLASSES
)
def test_replies_round_trip(
    parameters: ParameterSet,
    model_digest: bytes,
    of_key: bytes,
    query_digest: bytes,
    exponent: int,
    random: int,
    dimensions: int,
    classes: int,
) -> None:
    layout = layout_of(parameters, dimensions, classes, exponent)
    bits = exponent + 21
    polynomials = tuple(
        ReplyPolynomial(
            random_words(random + reply, len(layout.wanted(reply)), bits),
            random_words(random - reply + 2**33, layout.degree, bits),
        )
        for reply in range(layout.replies)
    )
    message = ReplyMessage(
        parameters, model_digest, of_key, layout, bits, query_digest, polynomials
    )
    data = message.serialize()
    assert len(data) == ReplyMessage.size(layout, bits)
    expected = {"model_digest": model_digest, "key_id": of_key, "query_digest": query_digest}
    found = ReplyMessage.deserialize(data, parameters, layout, bits, **expected)
    assert replace(found, polynomials=()) == replace(message, polynomials=())
    for mine, theirs in zip(found.polynomials, polynomials, strict=True):
        assert same(mine.c0, theirs.c0)
        assert same(mine.c1, theirs.c1)


# --- carried keys --------------------------------------------------------------------------------


def with_key(seed: bytes = SEED, *, seeds: tuple[bytes, ...] = (bytes(64),)) -> QueryMessage:
    """A query of one piece, with its key."""
    key = KeyMessage(COMPACT, Prng.SHAKE256, Domain.NTT, residues(1, COMPACT), seed).serialize()
    layout = layout_of(COMPACT, 2048 * len(seeds), 1, 0)
    polynomials = tuple(SeededPolynomial(residues(2 + i, COMPACT), s) for i, s in enumerate(seeds))
    return QueryMessage(
        COMPACT, bytes(32), key_id(key), layout, Prng.SHAKE256, Domain.NTT, polynomials, key
    )


def reads(message: QueryMessage, **changes: Any) -> QueryMessage:
    return QueryMessage.deserialize(message.serialize(), COMPACT, message.layout, **changes)


def test_a_carried_key_is_the_one_that_the_header_names() -> None:
    good = with_key()
    assert reads(good).key_message == good.key_message
    other = with_key(bytes(63) + b"\1").key_message
    for changed in (replace(good, key_id=bytes(32)), replace(good, key_message=other)):
        with pytest.raises(KeyMismatchError):
            reads(changed)
        data = changed.serialize()
        with pytest.raises(KeyMismatchError):
            carried_key(data, QueryHeader.deserialize(data))


def test_the_seed_of_a_carried_key_counts_without_being_told() -> None:
    """c1 = a lets a client read the reply's mask, whoever asks for the query to be read."""
    one, two = bytes(64), bytes(63) + b"\1"
    assert reads(with_key(seeds=(one, two)))
    for seeds in ((SEED,), (one, SEED), (SEED, one), (one, one)):
        for key_seed in (None, SEED, two):
            with pytest.raises(SeedReuseError):
                reads(with_key(seeds=seeds), key_seed=key_seed)
    with pytest.raises(SeedReuseError):
        reads(with_key(seeds=(two,)), key_seed=two)  # of a key that is known otherwise
    assert reads(with_key(seeds=(one,)), key_seed=SEED)  # which is told again


@pytest.mark.parametrize("cut", [1, 64, 12_904, 13_000, 25_767])
def test_a_carried_key_is_all_there(cut: int) -> None:
    good = with_key()
    data = good.serialize()[:-cut]
    with pytest.raises(MessageLengthError):
        QueryMessage.deserialize(data, COMPACT, good.layout)
    header = QueryHeader.deserialize(data)
    if len(data) < 136 + 12_904:
        with pytest.raises(MessageLengthError, match="expected a key"):
            carried_key(data, header)
    else:
        assert carried_key(data, header) == good.key_message


# --- damage --------------------------------------------------------------------------------------


class Reader:
    """Reads one recorded message as its receiver does, and writes it again."""

    def __init__(self, name: str, kind: str) -> None:
        self.kind = kind
        self.data = (VECTORS / f"{name}.{kind}.bin").read_bytes()
        self._manifest = Manifest.deserialize((VECTORS / f"{name}.manifest.json").read_bytes())
        texts = {"compact-block": 16, "compact-bulk": 100}.get(name, 1)
        self.layout = self._manifest.layout_of(texts)

    def again(self, data: bytes) -> bytes:
        manifest = self._manifest
        if self.kind == "key":
            return KeyMessage.deserialize(data).serialize()
        if self.kind in ("query", "query-with-key"):
            return QueryMessage.deserialize(data, manifest.parameter_set, self.layout).serialize()
        return ReplyMessage.deserialize(
            data,
            manifest.parameter_set,
            self.layout,
            manifest.scales.reply_bits,
            model_digest=self.data[40:72],
            key_id=self.data[72:104],
            query_digest=self.data[140:172],
        ).serialize()


READERS = [
    Reader(name, kind)
    for name in ("compact-384", "compact-3000", "standard-384", "compact-block", "compact-bulk")
    for kind in ("key", "query", "reply")
]
READERS.append(Reader("compact-384", "query-with-key"))


@given(st.sampled_from(READERS), st.data())
def test_damage_is_refused_or_seen(reader: Reader, data: st.DataObject) -> None:
    """Nothing but a `WireError` escapes, and no two byte strings read as the same message."""
    damaged = bytearray(reader.data)
    header = {"key": 40, "query": 136, "query-with-key": 136, "reply": 172}[reader.kind]
    kind = data.draw(st.sampled_from(["header", "body", "several", "shorter", "longer", "swap"]))
    if kind == "header":
        damaged[data.draw(st.integers(0, header - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "body":
        damaged[data.draw(st.integers(header, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "several":
        at = data.draw(st.integers(0, len(damaged) - 1))
        written = data.draw(st.binary(min_size=1, max_size=64))
        damaged[at : at + len(written)] = written
    elif kind == "shorter":
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    elif kind == "longer":
        damaged += data.draw(st.binary(min_size=1, max_size=200))
    else:
        half = len(damaged) // 2
        damaged = damaged[half:] + damaged[:half]
    changed = bytes(damaged)
    try:
        again = reader.again(changed)
    except WireError as error:
        refused = error.code
    else:
        assert again == changed
        return
    assert changed != reader.data, "a good message was refused"
    assert refused != WireError.code, "a bad message raised no error of its own"


@given(st.sampled_from(READERS), st.binary(max_size=400))
def test_noise_is_refused(reader: Reader, noise: bytes) -> None:
    with pytest.raises(WireError):
        reader.again(noise)


@given(st.sampled_from(READERS), st.integers(0, 2**32))
def test_noise_of_the_right_length_is_refused(reader: Reader, seed: int) -> None:
    noise = np.random.default_rng(seed).bytes(len(reader.data))
    with pytest.raises(WireError):
        reader.again(noise)
    # With a good prefix the counts, lengths and residues still have to hold.
    if reader.kind != "key":
        with pytest.raises(WireError):
            reader.again(reader.data[:40] + noise[40:])


def test_good_messages_are_not_refused() -> None:
    for reader in READERS:
        assert reader.again(reader.data) == reader.data


def test_huge_counts_allocate_nothing() -> None:
    """The header's counts are compared, never used as sizes."""
    reader = next(reader for reader in READERS if reader.kind == "query")
    for offset in range(108, 132, 4):
        damaged = bytearray(reader.data)
        struct.pack_into("<I", damaged, offset, 2**32 - 1)
        with pytest.raises(WireError, match="states"):
            reader.again(bytes(damaged))


@pytest.mark.parametrize("parameters", [COMPACT, STANDARD], ids=lambda p: p.name)
def test_residues_are_below_the_prime(parameters: ParameterSet) -> None:
    good, prime = residues(0, parameters), parameters.prime
    for value, accepted in ((prime - 1, True), (prime, False)):
        b = good.copy()
        b[5] = value
        data = KeyMessage(parameters, Prng.SHAKE256, Domain.NTT, b, bytes(64)).serialize()
        if accepted:
            KeyMessage.deserialize(data)
        else:
            with pytest.raises(ResidueRangeError):
                KeyMessage.deserialize(data)


def test_one_residue_is_not_a_zero_polynomial() -> None:
    b = np.zeros(2048, dtype=np.uint64)
    message = KeyMessage(COMPACT, Prng.SHAKE256, Domain.NTT, b, bytes(64))
    with pytest.raises(ZeroPolynomialError):
        KeyMessage.deserialize(message.serialize())
    b[2047] = 1
    assert KeyMessage.deserialize(message.serialize()).b.any()


def test_messages_in_errors_hold_no_residues() -> None:
    reader = READERS[0]
    damaged = bytearray(reader.data)
    damaged[40:47] = b"\xff" * 7
    with pytest.raises(ResidueRangeError) as raised:
        reader.again(bytes(damaged))
    assert "3ffffffffffff" not in str(raised.value)
