"""Messages <-> bytes. docs/wire-format.md is the specification; this file follows its order.

Untrusted bytes are checked limit first, then exact length, then every field, then every residue;
each rule has its own error. Nothing here calls SEAL.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from veilhead_protocol.errors import (
    DomainError,
    FormatVersionError,
    KeyMismatchError,
    MessageLayoutError,
    MessageLengthError,
    MessageTypeError,
    ModelMismatchError,
    PaddingError,
    ParameterMismatchError,
    PrngError,
    QueryMismatchError,
    ResidueRangeError,
    SeedReuseError,
    ZeroPolynomialError,
)
from veilhead_protocol.layout import MAX_PIECES, Layout
from veilhead_protocol.parameters import PARAMETER_SETS, ParameterSet

Residues = NDArray[np.uint64]

MAGIC: Final = b"VEIL"
FORMAT_VERSION: Final = 2
SEED_BYTES: Final = 64
DIGEST_BYTES: Final = 32

_PREFIX: Final = struct.Struct("<4sBBBB32s")  # magic, version, type, prng, domain, parameter id
_TARGET: Final = struct.Struct("<32s32s")  # model digest, key id
_COUNTS: Final = struct.Struct("<B3xIIIIIII")  # layout, texts, d, C, t, pieces, group, polynomials
_REPLY: Final = struct.Struct("<I32s")  # kappa, SHA-256 of the query

KEY_HEADER_BYTES: Final = _PREFIX.size
QUERY_HEADER_BYTES: Final = _PREFIX.size + _TARGET.size + _COUNTS.size
REPLY_HEADER_BYTES: Final = QUERY_HEADER_BYTES + _REPLY.size

#: Reply polynomials that are packed together: what bounds the memory of a large head's reply.
_ROWS_AT_ONCE: Final = 256


class MessageType(IntEnum):
    """The message's type byte.

    A query that carries its key has the header of a query, then the whole key message, and then
    the polynomials.
    """

    KEY = 1
    QUERY = 2
    REPLY = 3
    QUERY_WITH_KEY = 4


class Prng(IntEnum):
    """How a seed is expanded; 0 where a message has no seed."""

    NONE = 0
    BLAKE2XB = 1
    SHAKE256 = 2


class Domain(IntEnum):
    """What the residues and the expansion of the seed are: coefficients, or values under NTT."""

    COEFFICIENT = 0
    NTT = 1


# --- bit packing ---------------------------------------------------------------------------------


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` values of `width` bits take."""
    return -(-count * width // 8)


def pack_rows(values: Residues, width: int) -> NDArray[np.uint8]:
    """Each row of values [m, n] as `pack_bits` has it: [m, packed_bytes(n, width)]."""
    rows, count = values.shape
    octets = -(-count // 8)  # eight values of `width` bits fill exactly `width` bytes
    padded = values
    if count % 8:
        padded = np.zeros((rows, octets * 8), dtype=np.uint64)
        padded[:, :count] = values
    lanes = padded.reshape(rows, octets, 8)
    stride = octets * width
    # Windows of eight bytes reach beyond an octet of values, and there into the next row.
    buffer = np.zeros(rows * stride + 8, dtype=np.uint8)
    for lane in range(8):
        start, shift = divmod(lane * width, 8)
        window = np.ndarray(
            (rows, octets), dtype="<u8", buffer=buffer, offset=start, strides=(stride, width)
        )
        window |= lanes[..., lane] << np.uint64(shift)
    packed: NDArray[np.uint8] = buffer[:-8].reshape(rows, stride)[:, : packed_bytes(count, width)]
    return packed


def pack_bits(values: Residues, width: int) -> bytes:
    """Values [n] below 2^width (8 <= width <= 56), little-endian, without gaps, zero-padded."""
    return pack_rows(values[np.newaxis], width).tobytes()


def unpack_bits(data: bytes, count: int, width: int) -> Residues:
    """The inverse of `pack_bits`: values [count].

    Raises:
        MessageLengthError: when `data` is not exactly as long as needed.
        PaddingError: when a bit after the last value is set.
    """
    if len(data) != packed_bytes(count, width):
        raise MessageLengthError(
            f"got {len(data)} bytes of packed residues, expected {packed_bytes(count, width)}"
        )
    (values,) = _unpack_rows(data, 1, count, width, offset=0, stride=len(data))
    return np.asarray(values)


def _unpack_rows(
    data: bytes, rows: int, count: int, width: int, *, offset: int, stride: int
) -> Residues:
    """Values [rows, count] of runs that begin at `offset`, `offset + stride`, ...

    Raises:
        PaddingError: when a bit after the last value of a run is set.
    """
    length = packed_bytes(count, width)
    used = count * width % 8
    if used:
        last = np.frombuffer(data, dtype=np.uint8)[offset + length - 1 :: stride][:rows]
        if (last >> np.uint8(used)).any():
            raise PaddingError("padding bits after the last residue are not zero")
    octets = -(-count // 8)
    reach = offset + (rows - 1) * stride + octets * width + 8
    buffer = data if len(data) >= reach else data.ljust(reach, b"\0")
    starts, shifts = _lanes(width)
    # Eight bytes from every byte of an octet of values on; those where a value begins are picked.
    windows = np.ndarray((rows, octets, width), "<u8", buffer, offset, (stride, width, 1))
    values: Residues = windows[:, :, starts]
    values >>= shifts
    values &= np.uint64((1 << width) - 1)
    return values.reshape(rows, octets * 8)[:, :count]


@lru_cache(maxsize=64)
def _lanes(width: int) -> tuple[NDArray[np.intp], Residues]:
    """Where each of eight values of `width` bits begins: the byte [8], and the bit of it [8]."""
    bits = np.arange(8) * width
    return bits // 8, (bits % 8).astype(np.uint64)


def _polynomial_bytes(parameters: ParameterSet) -> int:
    return packed_bytes(parameters.poly_modulus_degree, parameters.residue_bits)


def _unpack_polynomials(
    data: bytes, polynomials: int, parameters: ParameterSet, *, offset: int, stride: int
) -> Residues:
    """Packed residues of polynomials that are `stride` bytes apart: [P, N].

    Every residue is in range, and none of the polynomials is zero.
    """
    residues = _unpack_rows(
        data,
        polynomials,
        parameters.poly_modulus_degree,
        parameters.residue_bits,
        offset=offset,
        stride=stride,
    )
    if residues.max() >= parameters.prime:
        raise ResidueRangeError(f"a residue is not below its prime {parameters.prime:#x}")
    if not residues.any(axis=1).all():
        raise ZeroPolynomialError("all residues of a polynomial are zero")
    return residues


# --- headers -------------------------------------------------------------------------------------


def _write_prefix(kind: MessageType, prng: Prng, domain: Domain, parameters: ParameterSet) -> bytes:
    return _PREFIX.pack(MAGIC, FORMAT_VERSION, kind, prng, domain, parameters.id)


def _read_prefix(
    data: bytes, *kinds: MessageType
) -> tuple[MessageType, Prng, Domain, ParameterSet]:
    magic, version, found, prng, domain, parameter_id = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise MessageTypeError("the message does not begin with 'VEIL'")
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"the message has format version {version}, expected {FORMAT_VERSION}"
        )
    if found not in kinds:
        names = " or ".join(f"{kind} ({kind.name})" for kind in kinds)
        raise MessageTypeError(f"the message has type {found}, expected {names}")
    kind = MessageType(found)
    for parameters in PARAMETER_SETS.values():
        if parameters.id == parameter_id:
            break
    else:
        raise ParameterMismatchError("the message has an unknown parameter id")
    if kind is MessageType.REPLY:
        if prng != Prng.NONE or domain != Domain.COEFFICIENT:
            raise PaddingError("the PRNG and domain bytes of a reply must be zero")
        return kind, Prng.NONE, Domain.COEFFICIENT, parameters
    if prng not in (Prng.BLAKE2XB, Prng.SHAKE256):
        raise PrngError(f"the message has PRNG {prng}, expected 1 (BLAKE2Xb) or 2 (SHAKE256)")
    if domain not in (Domain.COEFFICIENT, Domain.NTT):
        raise DomainError(f"the message has domain {domain}, expected 0 (coefficient) or 1 (NTT)")
    return kind, Prng(prng), Domain(domain), parameters


class Counts(NamedTuple):
    """The layout and counts that a message states, as read; nothing is believed of them."""

    layout: int
    texts: int
    dimensions: int
    classes: int
    block_length: int
    pieces: int
    group: int
    polynomials: int

    @classmethod
    def of(cls, layout: Layout, polynomials: int) -> Counts:
        """What a message of so many polynomials in this layout must state."""
        return cls(
            layout.kind,
            layout.texts,
            layout.dimensions,
            layout.classes,
            layout.block_length,
            layout.pieces,
            layout.group,
            polynomials,
        )

    def serialize(self) -> bytes:
        """The counts as the header holds them."""
        return _COUNTS.pack(*self)

    def check(self, layout: Layout, polynomials: int) -> None:
        """Raise `MessageLayoutError` unless this states exactly that layout."""
        expected = Counts.of(layout, polynomials)
        if self != expected:
            raise MessageLayoutError(f"the message states {self}, expected {expected}")


def _read_counts(data: bytes, offset: int) -> Counts:
    if data[offset + 1 : offset + 4] != b"\0\0\0":
        raise PaddingError("reserved bytes of the header are not zero")
    return Counts(*_COUNTS.unpack_from(data, offset))


@dataclass(frozen=True)
class QueryHeader:
    """What a query says of itself. It routes the query; `QueryMessage` then checks all of it."""

    has_key: bool
    prng: Prng
    domain: Domain
    parameters: ParameterSet
    model_digest: bytes
    key_id: bytes
    counts: Counts

    @classmethod
    def deserialize(cls, data: bytes) -> QueryHeader:
        """The header of a query.

        Raises:
            WireError: one of its kinds, for the first field that is wrong.
        """
        if len(data) < QUERY_HEADER_BYTES:
            raise MessageLengthError(
                f"got {len(data)} bytes, expected a query header of {QUERY_HEADER_BYTES}"
            )
        kind, prng, domain, parameters = _read_prefix(
            data, MessageType.QUERY, MessageType.QUERY_WITH_KEY
        )
        model_digest, key_id = _TARGET.unpack_from(data, _PREFIX.size)
        counts = _read_counts(data, _PREFIX.size + _TARGET.size)
        has_key = kind is MessageType.QUERY_WITH_KEY
        return cls(has_key, prng, domain, parameters, model_digest, key_id, counts)

    def serialize(self) -> bytes:
        """The bytes that the query begins with: `QUERY_HEADER_BYTES` of them."""
        kind = MessageType.QUERY_WITH_KEY if self.has_key else MessageType.QUERY
        return (
            _write_prefix(kind, self.prng, self.domain, self.parameters)
            + _TARGET.pack(self.model_digest, self.key_id)
            + self.counts.serialize()
        )


# --- messages ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyMessage:
    """An encryption of zero under a fresh secret: b [N], and a's seed."""

    parameters: ParameterSet
    prng: Prng
    domain: Domain
    b: Residues
    seed: bytes

    @staticmethod
    def size(parameters: ParameterSet) -> int:
        """Bytes of a key message under this set."""
        return KEY_HEADER_BYTES + _polynomial_bytes(parameters) + SEED_BYTES

    def serialize(self) -> bytes:
        """The message's bytes; their SHA-256 is the key's id."""
        prefix = _write_prefix(MessageType.KEY, self.prng, self.domain, self.parameters)
        return prefix + pack_bits(self.b, self.parameters.residue_bits) + self.seed

    @classmethod
    def deserialize(cls, data: bytes) -> KeyMessage:
        """The key message of these bytes.

        Raises:
            WireError: one of its kinds, for the first thing that is wrong.
        """
        if len(data) < KEY_HEADER_BYTES:
            raise MessageLengthError(
                f"got {len(data)} bytes, expected a key header of {KEY_HEADER_BYTES}"
            )
        _, prng, domain, parameters = _read_prefix(data, MessageType.KEY)
        if len(data) != cls.size(parameters):
            raise MessageLengthError(
                f"got {len(data)} bytes, expected {cls.size(parameters)} for a "
                f"{parameters.name} key"
            )
        (b,) = _unpack_polynomials(data, 1, parameters, offset=KEY_HEADER_BYTES, stride=len(data))
        return cls(parameters, prng, domain, b, data[-SEED_BYTES:])


def key_id(key_bytes: bytes) -> bytes:
    """The id under which a key message is registered: SHA-256 of its bytes."""
    return hashlib.sha256(key_bytes).digest()


@dataclass(frozen=True)
class SeededPolynomial:
    """One encrypted polynomial: c0 [N] and the seed of c1."""

    c0: Residues
    seed: bytes


@dataclass(frozen=True)
class QueryMessage:
    """Encrypted embeddings: one seeded ciphertext for every piece of the layout.

    `key_message` is the whole message of the key where the query carries it, and else empty.
    """

    parameters: ParameterSet
    model_digest: bytes
    key_id: bytes
    layout: Layout
    prng: Prng
    domain: Domain
    polynomials: tuple[SeededPolynomial, ...]
    key_message: bytes = b""

    @staticmethod
    def size(parameters: ParameterSet, layout: Layout, *, has_key: bool = False) -> int:
        """Bytes of a query in this layout."""
        size = QUERY_HEADER_BYTES + layout.pieces * (_polynomial_bytes(parameters) + SEED_BYTES)
        return size + KeyMessage.size(parameters) if has_key else size

    @property
    def header(self) -> QueryHeader:
        """What it says of itself."""
        return QueryHeader(
            bool(self.key_message),
            self.prng,
            self.domain,
            self.parameters,
            self.model_digest,
            self.key_id,
            Counts.of(self.layout, self.layout.pieces),
        )

    def serialize(self) -> bytes:
        """The message's bytes; a reply repeats their SHA-256."""
        residues = np.stack([polynomial.c0 for polynomial in self.polynomials])  # [P, N]
        parts = [self.header.serialize(), self.key_message]
        for packed, polynomial in zip(
            pack_rows(residues, self.parameters.residue_bits), self.polynomials, strict=True
        ):
            parts += [packed.tobytes(), polynomial.seed]
        return b"".join(parts)

    @classmethod
    def deserialize(
        cls, data: bytes, parameters: ParameterSet, layout: Layout, *, key_seed: bytes | None = None
    ) -> QueryMessage:
        """The query of these bytes, which must be in `layout`.

        The seeds are also checked against those of its keys, `key_seed` and that of a carried key:
        c1 = a would let a client read the reply's mask.

        Raises:
            WireError: one of its kinds, for the first thing that is wrong.
        """
        header = QueryHeader.deserialize(data)
        if header.parameters != parameters:
            raise ParameterMismatchError(
                f"the query is under {header.parameters.name}, expected {parameters.name}"
            )
        header.counts.check(layout, layout.pieces)
        expected = cls.size(parameters, layout, has_key=header.has_key)
        if len(data) != expected:
            raise MessageLengthError(f"got {len(data)} bytes, expected {expected} for this model")
        key_message = carried_key(data, header)
        start = QUERY_HEADER_BYTES + len(key_message)
        stride = _polynomial_bytes(parameters) + SEED_BYTES
        ends = range(start + stride, len(data) + 1, stride)
        seeds = [data[end - SEED_BYTES : end] for end in ends]
        of_keys = {seed for seed in (key_seed, key_message[-SEED_BYTES:]) if seed}
        if len(of_keys | set(seeds)) != len(of_keys) + len(seeds):
            raise SeedReuseError("a seed occurs twice, in the query or in the query and its key")
        residues = _unpack_polynomials(data, layout.pieces, parameters, offset=start, stride=stride)
        return cls(
            parameters,
            header.model_digest,
            header.key_id,
            layout,
            header.prng,
            header.domain,
            tuple(map(SeededPolynomial, residues, seeds)),
            key_message,
        )


def carried_key(data: bytes, header: QueryHeader) -> bytes:
    """The key message that a query of this header carries; empty where it carries none.

    Raises:
        MessageLengthError: when it is not all there.
        KeyMismatchError: when its SHA-256 is not the key id of the header.
    """
    if not header.has_key:
        return b""
    end = QUERY_HEADER_BYTES + KeyMessage.size(header.parameters)
    if len(data) < end:
        raise MessageLengthError(f"got {len(data)} bytes, expected a key up to byte {end}")
    key_message = data[QUERY_HEADER_BYTES:end]
    if not hmac.compare_digest(key_id(key_message), header.key_id):
        raise KeyMismatchError("the SHA-256 of the carried key is not the key id of the query")
    return key_message


@dataclass(frozen=True)
class ReplyPolynomial:
    """One reply polynomial modulo 2^kappa: the wanted coefficients of c0, and all of c1 [N]."""

    c0: Residues
    c1: Residues


@dataclass(frozen=True)
class ReplyMessage:
    """Encrypted logits: one polynomial for every group of classes."""

    parameters: ParameterSet
    model_digest: bytes
    key_id: bytes
    layout: Layout
    reply_bits: int
    query_digest: bytes
    polynomials: tuple[ReplyPolynomial, ...]

    @staticmethod
    @lru_cache(maxsize=1024)
    def size(layout: Layout, reply_bits: int) -> int:
        """Bytes of a reply in this layout."""
        c0 = sum(
            packed_bytes(len(layout.wanted(reply)), reply_bits) for reply in range(layout.replies)
        )
        return REPLY_HEADER_BYTES + c0 + layout.replies * packed_bytes(layout.degree, reply_bits)

    def serialize(self) -> bytes:
        """The message's bytes."""
        parts = [
            _write_prefix(MessageType.REPLY, Prng.NONE, Domain.COEFFICIENT, self.parameters),
            _TARGET.pack(self.model_digest, self.key_id),
            Counts.of(self.layout, len(self.polynomials)).serialize(),
            _REPLY.pack(self.reply_bits, self.query_digest),
        ]
        for start in range(0, len(self.polynomials), _ROWS_AT_ONCE):
            polynomials = self.polynomials[start : start + _ROWS_AT_ONCE]
            # The last reply polynomial may hold fewer classes than the others.
            even = [one.c0 for one in polynomials if len(one.c0) == len(polynomials[0].c0)]
            wanted = [*pack_rows(np.stack(even), self.reply_bits)]
            if len(even) < len(polynomials):
                wanted += [*pack_rows(polynomials[-1].c0[np.newaxis], self.reply_bits)]
            masks = pack_rows(np.stack([one.c1 for one in polynomials]), self.reply_bits)
            for c0, c1 in zip(wanted, masks, strict=True):
                parts += [c0.tobytes(), c1.tobytes()]
        return b"".join(parts)

    @classmethod
    def deserialize(
        cls,
        data: bytes,
        parameters: ParameterSet,
        layout: Layout,
        reply_bits: int,
        *,
        model_digest: bytes,
        key_id: bytes,
        query_digest: bytes,
    ) -> ReplyMessage:
        """The reply of these bytes, which must answer the query of that digest.

        No check depends on a decrypted value.

        Raises:
            WireError: one of its kinds, for the first thing that is wrong.
        """
        if len(data) != cls.size(layout, reply_bits):
            raise MessageLengthError(
                f"got {len(data)} bytes, expected a reply of {cls.size(layout, reply_bits)}"
            )
        *_, found = _read_prefix(data, MessageType.REPLY)
        if found != parameters:
            raise ParameterMismatchError(
                f"the reply is under {found.name}, expected {parameters.name}"
            )
        found_model, found_key = _TARGET.unpack_from(data, _PREFIX.size)
        if found_model != model_digest:
            raise ModelMismatchError("the reply is from another model than the one asked")
        if found_key != key_id:
            raise KeyMismatchError("the reply is under another key than the query")
        _read_counts(data, _PREFIX.size + _TARGET.size).check(layout, layout.replies)
        found_bits, found_query = _REPLY.unpack_from(data, QUERY_HEADER_BYTES)
        if found_bits != reply_bits:
            raise MessageLayoutError(
                f"the reply has residues of {found_bits} bits, expected {reply_bits}"
            )
        if found_query != query_digest:
            raise QueryMismatchError("the reply answers another query")
        mask_bytes = packed_bytes(layout.degree, reply_bits)
        stride = packed_bytes(len(layout.wanted(0)), reply_bits) + mask_bytes
        polynomials: list[ReplyPolynomial] = []
        offset = REPLY_HEADER_BYTES
        # The last polynomial may hold fewer classes than the others.
        last = layout.replies - 1
        even = len(layout.wanted(last)) == len(layout.wanted(0))
        for rows, reply in ((layout.replies, 0),) if even else ((last, 0), (1, last)):
            if rows:
                count = len(layout.wanted(reply))
                c0 = _unpack_rows(data, rows, count, reply_bits, offset=offset, stride=stride)
                offset += packed_bytes(count, reply_bits)
                c1 = _unpack_rows(
                    data, rows, layout.degree, reply_bits, offset=offset, stride=stride
                )
                polynomials += map(ReplyPolynomial, c0, c1)
                offset += rows * stride - packed_bytes(count, reply_bits)
        return cls(
            parameters,
            model_digest,
            key_id,
            layout,
            reply_bits,
            query_digest,
            tuple(polynomials),
        )


#: Largest body of a key message.
MAX_KEY_BYTES: Final = max(KeyMessage.size(parameters) for parameters in PARAMETER_SETS.values())

#: Largest body of a query that any model can be sent. What a model takes is known from the header.
MAX_QUERY_BYTES: Final = (
    QUERY_HEADER_BYTES
    + MAX_KEY_BYTES
    + max(
        MAX_PIECES * (_polynomial_bytes(parameters) + SEED_BYTES)
        for parameters in PARAMETER_SETS.values()
    )
)
