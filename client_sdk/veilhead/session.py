"""Keys, encryption and decryption: the only place where a secret key lives.

A secret key is made here, never leaves, is never written, and dies with its object. Logits are
rounded before anything outside sees them: an unrounded value is an exact linear equation in the
secret key.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tenseal import sealapi

from veilhead.even_encoding import encode_evenly
from veilhead_protocol import seal_io
from veilhead_protocol.copies import MadeAhead, process_mark
from veilhead_protocol.decryption import (
    DecryptionKey,
    rounded_logits,
    secret_coefficients,
    wanted_values,
)
from veilhead_protocol.errors import EncryptionError, NotFiniteError, VeilheadError
from veilhead_protocol.layout import Layout, plan
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.parameters import ParameterSet
from veilhead_protocol.scales import project
from veilhead_protocol.wire import (
    Domain,
    KeyMessage,
    Prng,
    QueryMessage,
    ReplyMessage,
    SeededPolynomial,
    key_id,
)

#: A key is replaced after so many queries or seconds, whichever comes first.
MAX_QUERIES_PER_KEY: Final = 100
MAX_KEY_SECONDS: Final = 600.0


class SecretKey:
    """One fresh ternary secret, with what can be published of it: `message` and `id`."""

    def __init__(self, parameters: ParameterSet) -> None:
        seal = seal_io.runtime(parameters)
        secret = sealapi.KeyGenerator(seal.context).secret_key()
        self._encryptor = sealapi.Encryptor(seal.context, secret)
        b, prng, seed = seal_io.save_seeded(
            seal, self._encryptor.encrypt_zero_symmetric(seal.parms_id)
        )
        message = KeyMessage(parameters, Prng(prng), Domain.NTT, b, seed)
        self.message = message.serialize()
        self.id = key_id(self.message)
        self._seal = seal
        self._decryption = DecryptionKey(secret_coefficients(seal, secret))
        self._zeros: MadeAhead[SeededPolynomial] = MadeAhead()

    def __repr__(self) -> str:
        return f"SecretKey(id={self.id.hex()[:12]})"

    def __reduce__(self) -> Any:
        raise TypeError("a secret key cannot be pickled or copied")

    def encrypt(self, coefficients: NDArray[np.float64], scale_bits: int) -> SeededPolynomial:
        """A fresh encryption of coefficients [N], with 64 fresh random bytes from SEAL.

        It is one of zero, made now or ahead, plus the plaintext.
        """
        # Taken out: two messages over one zero would show their difference to anybody.
        zero = self._zeros.take(self._encrypt_zero)
        c0 = zero.c0
        for plaintext in encode_evenly(self._seal, coefficients, scale_bits):
            c0 = seal_io.add_plaintext(self._seal, c0, plaintext)
        return SeededPolynomial(c0, zero.seed)

    def prepare(self, count: int) -> None:
        """Encrypt zeros ahead, so that the next `count` polynomials take little time."""
        while len(self._zeros) < count:
            self._zeros.add(self._encrypt_zero())

    def _encrypt_zero(self) -> SeededPolynomial:
        c0, _, seed = seal_io.save_seeded(
            self._seal, self._encryptor.encrypt_zero_symmetric(self._seal.parms_id)
        )
        return SeededPolynomial(c0, seed)

    def decrypt(self, reply: ReplyMessage) -> NDArray[np.float64]:
        """Wanted coefficients of c0 + c1 s, as `wanted_values` has them: never published."""
        return wanted_values(reply, self._decryption)


class EncryptedQuery:
    """A query, which is encrypted when its bytes are first asked for, and never a second time.

    A retry sends the same bytes.

    Attributes:
        key: what it is encrypted under.
        layout: the layout of the request, by its number of texts.
        carries_key: whether the message of the key goes with the query, and is not registered.
        header: what the query message begins with, which is there before the rest is encrypted.
        size: the length of the query message.
        reply_bytes: the exact length of its reply.
        encrypt_seconds: what encryption took; 0 before it.
        failures: why rows could not be encrypted, by their places; none before encryption.
    """

    def __init__(
        self,
        key: SecretKey,
        message: QueryMessage,
        reply_bits: int,
        encrypt: Callable[[], tuple[SeededPolynomial, ...]],
        failures: dict[int, VeilheadError] | None = None,
    ) -> None:
        """Describe it.

        Args:
            key: what it is encrypted under.
            message: the query message, still without polynomials.
            reply_bits: kappa of the model.
            encrypt: what makes the polynomials; it is called once.
            failures: what `encrypt` writes failures into.
        """
        self.key = key
        self.layout = message.layout
        self.carries_key = bool(message.key_message)
        self.header = message.header.serialize() + message.key_message
        self.size = QueryMessage.size(message.parameters, message.layout, has_key=self.carries_key)
        self.reply_bytes = ReplyMessage.size(message.layout, reply_bits)
        self.encrypt_seconds = 0.0
        self.failures = {} if failures is None else failures
        self._message = message
        self._encrypt = encrypt

    @cached_property
    def data(self) -> bytes:
        """The query message.

        Raises:
            EncryptionError: when not even decoys can be encrypted.
        """
        started = time.perf_counter()
        data = replace(self._message, polynomials=self._encrypt()).serialize()
        self.encrypt_seconds = time.perf_counter() - started
        del self._encrypt  # and with it the embeddings
        return data

    def pieces(self) -> Iterator[bytes]:
        """The query message, header first."""
        yield self.header
        yield self.data[len(self.header) :]
        _ = self.digest  # the reply is not here yet

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of `data`, which the reply repeats."""
        return hashlib.sha256(self.data).digest()


class Session:
    """Encrypts embeddings for one model and decrypts its replies, under keys that it rotates.

    With `fresh_keys` no key serves more than one query.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        fresh_keys: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._manifest = manifest
        self._fresh_keys = fresh_keys
        self._parameters = manifest.parameter_set
        self._scales = manifest.scales
        self._clock = clock
        self._key: SecretKey | None = None
        self._process = process_mark()  # that made the key
        self._queries = 0
        self._expires = 0.0
        self._random = np.random.default_rng()  # seeded by the operating system; for decoys only

    def plan(self, texts: int) -> list[int]:
        """Texts in each request, for so many texts to cost little: the largest requests first."""
        return plan(self._manifest.shape, texts)

    def encrypt(self, embedding: NDArray[np.float64]) -> EncryptedQuery:
        """The query for one embedding [d] in its original scale.

        It is under the session's key, or, where keys are fresh, under one that it carries itself.
        In the place of a row that is not finite, or that encryption fails on, a decoy is encrypted,
        so that the service cannot tell: `failures` of the query then says why, and the caller
        raises once everything is sent.
        """
        key = self._fresh_enough_key()
        self._queries += 1
        if self._fresh_keys:
            self._key = None
        return self._query(embedding[np.newaxis], key, carries_key=self._fresh_keys)

    def prepare(self) -> None:
        """Do ahead what the next query of one embedding needs and does not depend on it."""
        self._fresh_enough_key().prepare(self._manifest.layout.pieces)

    def encrypt_batch(self, embeddings: NDArray[np.float64]) -> EncryptedQuery:
        """The query for embeddings [b, d], as `encrypt`, under a key of its own, which it carries.

        The session's key is not touched: this may run on another thread.

        Raises:
            LayoutError: when the model does not take so many rows at once.
        """
        query = self._query(embeddings, SecretKey(self._parameters), carries_key=True)
        _ = query.data  # now, on this thread
        return query

    def _query(
        self, embeddings: NDArray[np.float64], key: SecretKey, *, carries_key: bool
    ) -> EncryptedQuery:
        layout = self._manifest.layout_of(len(embeddings))
        message = QueryMessage(
            parameters=self._parameters,
            model_digest=self._manifest.digest,
            key_id=key.id,
            layout=layout,
            prng=Prng.BLAKE2XB,
            domain=Domain.NTT,
            polynomials=(),
            key_message=key.message if carries_key else b"",
        )
        failures: dict[int, VeilheadError] = {}
        encrypt = partial(self._encrypt, embeddings, key, layout, failures)
        return EncryptedQuery(key, message, self._scales.reply_bits, encrypt, failures)

    def _encrypt(
        self,
        embeddings: NDArray[np.float64],
        key: SecretKey,
        layout: Layout,
        failures: dict[int, VeilheadError],
    ) -> tuple[SeededPolynomial, ...]:
        """Polynomials of embeddings [b, d], whatever these are: the header may be sent already.

        Raises:
            EncryptionError: when not even decoys can be encrypted.
        """
        # Drawn whether they are needed or not: that would show in the time.
        shape = (layout.texts, layout.dimensions)
        decoys = self._random.random(shape) - 0.5
        decoys /= np.linalg.norm(decoys, axis=1, keepdims=True)
        try:
            if embeddings.shape != shape:
                raise ValueError("embeddings of another shape")
            rows = project(embeddings, self._manifest.embedding.scale)
            finite = np.isfinite(rows).all(axis=1, keepdims=True)  # [b, 1]
            polynomials = self._encrypted(np.where(finite, rows, decoys), key, layout)
        except Exception as error:  # SEAL, NumPy and Python raise whatever they raise
            failure = EncryptionError(f"the row could not be encrypted: {type(error).__name__}")
            failure.__cause__ = error
            failures.update(dict.fromkeys(range(len(embeddings)), failure))
            try:
                return self._encrypted(decoys, key, layout)
            except Exception:
                raise failure from error
        for place in np.flatnonzero(~finite).tolist():
            failures[place] = NotFiniteError("the embedding holds NaN or infinity")
        return polynomials

    def _encrypted(
        self, rows: NDArray[np.float64], key: SecretKey, layout: Layout
    ) -> tuple[SeededPolynomial, ...]:
        return tuple(
            key.encrypt(piece, self._scales.query_scale_bits)
            for piece in layout.pack_embeddings(rows)
        )

    def decrypt(self, query: EncryptedQuery, reply: bytes) -> NDArray[np.float64]:
        """Logits of a query of one embedding: [C], rounded as `round_logits` does.

        Raises:
            WireError: one of its kinds, when the bytes are not the reply to this query. No check
                depends on a decrypted value.
        """
        return self.decrypt_batch(query, reply).reshape(-1)

    def decrypt_batch(self, query: EncryptedQuery, reply: bytes) -> NDArray[np.float64]:
        """Logits of a query of any number of embeddings: [b, C]; raises as `decrypt`."""
        message = ReplyMessage.deserialize(
            reply,
            self._parameters,
            query.layout,
            self._scales.reply_bits,
            model_digest=self._manifest.digest,
            key_id=query.key.id,
            query_digest=query.digest,
        )
        return rounded_logits(query.key.decrypt(message), self._manifest)

    @property
    def reply_bytes(self) -> int:
        """The exact length of a reply to a query of one embedding."""
        return ReplyMessage.size(self._manifest.layout, self._scales.reply_bits)

    @property
    def current_key_id(self) -> bytes | None:
        """The key that the next query of one embedding may be under; None before the first."""
        return None if self._key is None else self._key.id

    def forget(self) -> None:
        """Drop the current key; the next query makes a new one."""
        self._key = None

    def _fresh_enough_key(self) -> SecretKey:
        now, process = self._clock(), process_mark()
        if self._process != process:
            self._key = None  # another process has it too, and counts its queries by itself
        if self._key is None or self._queries >= MAX_QUERIES_PER_KEY or now >= self._expires:
            self._key = SecretKey(self._parameters)
            self._process = process
            self._queries = 0
            self._expires = now + MAX_KEY_SECONDS
        return self._key
