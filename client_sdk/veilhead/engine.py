"""Queries in flight: one session, one connection pool, keys that are registered as needed."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, TypeVar

import anyio
import anyio.to_thread
import httpx2
import numpy as np
from numpy.typing import NDArray

from veilhead.session import EncryptedQuery, SecretKey, Session
from veilhead.transport import Answer, Transport
from veilhead_protocol.errors import (
    CallTimeoutError,
    EncryptionError,
    ManifestError,
    NotSentError,
    ParameterError,
    ReplyError,
    ServiceResponseError,
    TransportError,
    VeilheadError,
    WireError,
)
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.parameters import parameter_set
from veilhead_protocol.signatures import (
    VendorKey,
    read_signatures,
    require_card_signature,
    require_signature,
)

#: A key may be dropped by the service between its registration and the query, but not for ever.
_REGISTRATIONS: Final = 3

#: Rows that are handed over together at least.
_CHUNK: Final = 32

#: What may be asked for at once, in the units of a layout's cost, and the seconds that each unit
#: adds to the time that an answer may take: a head of 4,096 classes evaluates for seconds.
_COST_IN_FLIGHT: Final = 160_000
_COST_SECONDS: Final = 0.001

_GOODBYE_SECONDS: Final = 2.0

#: After an answer, before work is done ahead for the next query: the caller has the answer first.
_PREPARE_SECONDS: Final = 0.001

Row = NDArray[np.float64] | VeilheadError  # logits [C], or why there are none

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class QueryTrace:
    """What one query cost. It holds times and sizes only.

    Attributes:
        encrypt_seconds: embedding to query bytes.
        round_trip_seconds: query bytes out to reply bytes in, retries included.
        evaluate_seconds: what the service says it spent of that.
        decrypt_seconds: reply bytes to logits.
        key_bytes: size of the key message, which is sent once for many queries, or with this one.
        query_bytes: size of the query without a key that it carries.
        reply_bytes: size of the reply.
        texts: embeddings in the query.
    """

    encrypt_seconds: float
    round_trip_seconds: float
    evaluate_seconds: float
    decrypt_seconds: float
    key_bytes: int
    query_bytes: int
    reply_bytes: int
    texts: int = 1


class Call:
    """One call of the user's: once a row shows that none can succeed, no further one is sent.

    Its time limit depends on the clock alone: what is sent, or not, tells no more.

    Attributes:
        hopeless: what showed it.
    """

    def __init__(self, seconds: float | None = None, *, each_chunk: bool = False) -> None:
        """Begin it.

        Args:
            seconds: what it may take in all; None for ever.
            each_chunk: of a stream: so long may the service take with each chunk.
        """
        self.hopeless: VeilheadError | None = None
        self._seconds = seconds
        self._is_stream = each_chunk
        is_limited = seconds is not None and not each_chunk
        self._ends = anyio.current_time() + (seconds or 0) if is_limited else math.inf

    def not_sent(self) -> VeilheadError:
        """What becomes of a further row."""
        if isinstance(self.hopeless, CallTimeoutError) and not self._is_stream:
            return self.hopeless
        return NotSentError(
            f"not sent, since an earlier row failed for all of them: {self.hopeless}"
        )

    async def in_time(self, work: Awaitable[_Value]) -> _Value:
        """What `work` gives before the call's time is over, that of a stream never.

        Raises:
            CallTimeoutError: when it is over; no further row is sent.
        """
        return await self._until(self._ends, work)

    async def answered_in_time(self, work: Awaitable[_Value]) -> _Value:
        """As `in_time`; the service may take the call's seconds with a chunk of a stream."""
        if self._is_stream and self._seconds is not None:
            return await self._until(anyio.current_time() + self._seconds, work)
        return await self._until(self._ends, work)

    async def _until(self, moment: float, work: Awaitable[_Value]) -> _Value:
        if moment == math.inf:
            return await work
        with anyio.CancelScope(deadline=moment):
            return await work
        self.hopeless = CallTimeoutError(
            f"no answer within the {self._seconds:g} s that call_timeout gives: give more, or "
            "fewer texts in one call"
        )
        raise self.hopeless


@dataclass
class Engine:
    """What runs on the event loop: one session, one connection pool, many queries in flight."""

    transport: Transport
    model: str
    concurrency: int
    on_query: Callable[[QueryTrace], None] | None
    pad_batches: bool = False
    fresh_keys: bool = False
    vendor_keys: Sequence[VendorKey] = ()
    prepare: bool = True
    manifest: Manifest = field(init=False)
    session: Session = field(init=False)
    _slots: anyio.Semaphore = field(init=False)
    _registration: anyio.Lock = field(init=False)
    _registered: set[bytes] = field(init=False, default_factory=set)  # ids: secrets die early
    _in_use: Counter[bytes] = field(init=False, default_factory=Counter)
    _preparation: asyncio.TimerHandle | None = field(init=False, default=None)

    @cached_property
    def chunk(self) -> int:
        """Rows that are best handed over together."""
        best = self.session.plan(self.manifest.parameter_set.poly_modulus_degree)[0]
        return best * -(-_CHUNK // best)

    async def open(self, digest: str | None, minimum_parameters: str) -> None:
        """Read, check and pin the manifest."""
        self._registration = anyio.Lock()
        minimum = parameter_set(minimum_parameters)
        answer = await self.transport.get_manifest(self.model, digest)
        if self.vendor_keys:
            # Before anything is parsed: the digest is that of the very bytes.
            found = hashlib.sha256(answer.body).digest()
            require_signature(found, read_signatures(answer.signatures), self.vendor_keys)
        manifest = Manifest.deserialize(answer.body)
        if manifest.name != self.model:
            raise ManifestError("the service sent the manifest of another model")
        if digest is not None and manifest.digest.hex() != digest:
            raise ManifestError("the service sent the manifest of another version than the pinned")
        if not manifest.parameter_set.at_least(minimum):
            raise ParameterError(
                f"the model uses the parameter set {manifest.parameters}, "
                f"this client accepts {minimum.name} at least"
            )
        self.manifest = manifest
        self.session = Session(manifest, fresh_keys=self.fresh_keys)
        # More queries of a large head would only wait in line at the service.
        fitting = max(2, _COST_IN_FLIGHT // manifest.layout.cost)
        self._slots = anyio.Semaphore(min(self.concurrency, fitting))

    async def card(self) -> str:
        """The card of the pinned version; with vendor keys, one that a key of them signed."""
        digest = self.manifest.digest
        answer = await self.transport.get_card(self.model, digest.hex())
        if self.vendor_keys:
            signatures = read_signatures(answer.signatures)
            require_card_signature(digest, answer.body, signatures, self.vendor_keys)
        try:
            return answer.body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ReplyError("the model card is not UTF-8") from error

    async def infer(self, embeddings: NDArray[np.float64], call: Call) -> list[Row]:
        """Logits, or an error, for each row of embeddings [batch, d].

        The rows go out in as few requests as are cheap. One is encrypted while others are on the
        wire. With `pad_batches` decoys make their number a power of two. Rows that are answered
        before the call's time is over keep their answers.
        """
        count = len(embeddings)
        if self.pad_batches and count > 0:
            padding = (1 << (count - 1).bit_length()) - count
            # Rows that hold nothing: the session encrypts decoys in their places.
            embeddings = np.pad(embeddings, ((0, padding), (0, 0)), constant_values=np.nan)
        rows: list[Row | None] = [None] * len(embeddings)
        unanswered: VeilheadError = NotSentError("not sent")
        try:
            await call.answered_in_time(self._infer_into(rows, embeddings, call))
        except CallTimeoutError as late:
            unanswered = late
        return [unanswered if row is None else row for row in rows[:count]]

    async def _infer_into(
        self, rows: list[Row | None], embeddings: NDArray[np.float64], call: Call
    ) -> None:
        """Put logits, or an error, for each row of embeddings [batch, d] into `rows`."""

        async def one(start: int, size: int) -> None:
            async with self._slots:
                found = await self._infer_rows(embeddings[start : start + size], call)
            rows[start : start + size] = [found] * size if isinstance(found, Exception) else found

        sizes, unused = self.session.plan(len(embeddings)), self._take_unused_keys()
        if len(sizes) == 1 and not unused:
            await one(0, *sizes)
            return
        async with anyio.create_task_group() as tasks:
            for key_id in unused:  # of earlier calls: no call waits for its own
                tasks.start_soon(self._delete, key_id)
            start = 0
            for size in sizes:
                tasks.start_soon(one, start, size)
                start += size

    async def _infer_rows(
        self, embeddings: NDArray[np.float64], call: Call
    ) -> list[Row] | VeilheadError:
        """Logits of the rows of one request, or why there are none for any of them."""
        if call.hopeless is not None:
            return call.not_sent()
        if len(embeddings) == 1:
            query = self.session.encrypt(embeddings[0])
        else:
            # On a thread: what is on the wire goes on meanwhile.
            try:
                query = await anyio.to_thread.run_sync(self.session.encrypt_batch, embeddings)
            except EncryptionError as error:
                return error
        self._in_use[query.key.id] += 1
        try:
            answer, waited = await self._ask(query)
        except (ReplyError, EncryptionError) as error:
            return error
        except (TransportError, ServiceResponseError) as error:
            call.hopeless = error
            return error
        finally:
            self._in_use[query.key.id] -= 1
            self._in_use += Counter()  # without the zeros
        received = time.perf_counter()
        try:
            logits = self.session.decrypt_batch(query, answer.body)
        except WireError as error:
            return ReplyError(f"the service's reply was refused: {error}")
        if self.on_query is not None:
            self.on_query(
                QueryTrace(
                    encrypt_seconds=query.encrypt_seconds,
                    round_trip_seconds=waited,
                    evaluate_seconds=answer.evaluate_seconds,
                    decrypt_seconds=time.perf_counter() - received,
                    key_bytes=len(query.key.message),
                    query_bytes=query.size - (len(query.key.message) if query.carries_key else 0),
                    reply_bytes=len(answer.body),
                    texts=len(embeddings),
                )
            )
        if len(embeddings) == 1 and self.prepare:
            self._prepare_later()
        rows: list[Row] = list(logits)
        for place, failure in query.failures.items():
            rows[place] = failure
        return rows

    def _prepare_later(self) -> None:
        """Encrypt zeros for the next single query, in a moment that is likely to be idle."""
        if self._preparation is not None:
            self._preparation.cancel()
        self._preparation = asyncio.get_running_loop().call_later(
            _PREPARE_SECONDS, self.session.prepare
        )

    async def _ask(self, query: EncryptedQuery) -> tuple[Answer, float]:
        """The answer to a query and the seconds it took; registers the key as often as needed."""
        for attempt in range(1, _REGISTRATIONS + 1):
            if not query.carries_key:
                await self._register(query.key)
            started, before = time.perf_counter(), query.encrypt_seconds
            try:
                answer = await self.transport.infer(
                    self.model,
                    query.pieces,
                    query.size,
                    query.reply_bytes,
                    more_seconds=query.layout.cost * _COST_SECONDS,
                )
            except ServiceResponseError as error:
                lost = error.problem == "key-not-registered" and not query.carries_key
                if not lost or attempt == _REGISTRATIONS:
                    raise
                self._registered.discard(query.key.id)
            else:
                # It may have been encrypted just now, between the header and the body.
                return answer, time.perf_counter() - started - (query.encrypt_seconds - before)
        raise AssertionError("the last attempt returns or raises")

    async def _register(self, key: SecretKey) -> None:
        if key.id in self._registered:
            return
        async with self._registration:
            if key.id not in self._registered:
                await self.transport.put_key(key.id, key.message)
                self._registered.add(key.id)

    def _take_unused_keys(self) -> set[bytes]:
        """Ids of registered keys that no further query will be under, for the caller to delete."""
        unused = self._registered - self._in_use.keys() - {self.session.current_key_id}
        self._registered -= unused  # before any other call looks
        return unused

    async def _delete(self, key_id: bytes) -> None:
        """Let the service drop a key; when it does not hear this, the key expires."""
        # A call waits for this too.
        with suppress(httpx2.HTTPError), anyio.move_on_after(_GOODBYE_SECONDS):
            await self.transport.delete_key(key_id)

    async def close(self) -> None:
        """Drop the keys, here and (as far as it listens) at the service."""
        if not self.transport.is_here:
            return
        if self._preparation is not None:
            self._preparation.cancel()
        with anyio.move_on_after(_GOODBYE_SECONDS):
            while self._registered:
                await self._delete(self._registered.pop())
        self.session.forget()


@asynccontextmanager
async def opened_engine(
    url: str,
    model: str,
    *,
    digest: str | None,
    minimum_parameters: str,
    vendor_keys: Sequence[VendorKey],
    api_key: str | None,
    pad_batches: bool,
    fresh_keys: bool,
    prepare: bool,
    concurrency: int,
    timeout: float,
    call_timeout: float | None,
    on_query: Callable[[QueryTrace], None] | None,
    transport: httpx2.AsyncBaseTransport | None,
) -> AsyncIterator[Engine]:
    """An engine with its manifest pinned; its arguments and errors are those of `Client`."""
    async with Transport(
        url, timeout=timeout, connections=concurrency, api_key=api_key, transport=transport
    ) as connection:
        engine = Engine(
            connection, model, concurrency, on_query, pad_batches, fresh_keys, vendor_keys, prepare
        )
        await Call(call_timeout).in_time(engine.open(digest, minimum_parameters))
        try:
            yield engine
        finally:
            await engine.close()
