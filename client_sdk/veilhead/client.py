"""The client: text in, labels out, and nothing but ciphertexts in between."""

from __future__ import annotations

import hashlib
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, overload

import anyio
import httpx2
import numpy as np
from anyio.from_thread import BlockingPortal, start_blocking_portal
from numpy.typing import ArrayLike, NDArray

from veilhead.api_key import find_api_key
from veilhead.backbone_cache import fetch_backbone
from veilhead.predictions import Prediction, predictions
from veilhead.session import SecretKey, Session
from veilhead.transport import Answer, Transport
from veilhead_protocol.errors import (
    BackboneError,
    BatchError,
    InputError,
    ManifestError,
    NoBackboneError,
    NotFiniteError,
    NotSentError,
    ParameterError,
    ReplyError,
    ServiceResponseError,
    SignatureError,
    TransportError,
    VeilheadError,
    WireError,
)
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.parameters import parameter_set
from veilhead_protocol.signatures import VendorKey, read_signatures, require_signature

if TYPE_CHECKING:
    from veilhead_models.backbone import Backbone

#: Texts that are embedded together, and sent while the next ones are embedded.
_CHUNK: Final = 32

#: Chunks on the wire at once: what bounds the memory of a long call.
_CHUNKS_IN_FLIGHT: Final = 8

#: A key may be dropped by the service between its registration and the query, but not for ever.
_REGISTRATIONS: Final = 3

#: Polynomial products that may be asked for at once, and what each adds to the time that an answer
#: may take: a head of 4,096 classes evaluates for seconds, one of 22 classes for milliseconds.
_PRODUCTS_IN_FLIGHT: Final = 8192
_PRODUCT_SECONDS: Final = 0.02

_GOODBYE_SECONDS: Final = 2.0

_Row = NDArray[np.float64] | VeilheadError  # logits [C], or why there are none


@dataclass(frozen=True)
class QueryTrace:
    """What one query cost. It holds times and sizes only.

    Attributes:
        encrypt_seconds: embedding to query bytes.
        round_trip_seconds: query bytes out to reply bytes in, retries included.
        evaluate_seconds: what the service says it spent of that.
        decrypt_seconds: reply bytes to logits.
        key_bytes: size of the key message, which is sent once for many queries.
        query_bytes: size of the query.
        reply_bytes: size of the reply.
    """

    encrypt_seconds: float
    round_trip_seconds: float
    evaluate_seconds: float
    decrypt_seconds: float
    key_bytes: int
    query_bytes: int
    reply_bytes: int


@dataclass
class _Call:
    """One call of the user's: once a row shows that none can succeed, no further one is sent."""

    hopeless: VeilheadError | None = None


@dataclass
class _Engine:
    """What runs on the event loop: one session, one connection pool, many queries in flight."""

    transport: Transport
    model: str
    concurrency: int
    on_query: Callable[[QueryTrace], None] | None
    manifest: Manifest = field(init=False)
    session: Session = field(init=False)
    _slots: anyio.Semaphore = field(init=False)
    _more_seconds: float = field(init=False)
    _registration: anyio.Lock = field(init=False)
    _registered: weakref.WeakSet[SecretKey] = field(init=False, default_factory=weakref.WeakSet)

    async def open(
        self, digest: str | None, minimum_parameters: str, vendor_keys: Sequence[VendorKey]
    ) -> None:
        """Read, check and pin the manifest."""
        self._registration = anyio.Lock()
        minimum = parameter_set(minimum_parameters)
        answer = await self.transport.get_manifest(self.model, digest)
        if vendor_keys:
            # Before anything is parsed: the digest is that of the very bytes.
            found = hashlib.sha256(answer.body).digest()
            require_signature(found, read_signatures(answer.signatures), vendor_keys)
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
        self.session = Session(manifest)
        # More queries of a large head would only wait in line at the service.
        fitting = max(2, _PRODUCTS_IN_FLIGHT // manifest.layout.products)
        self._slots = anyio.Semaphore(min(self.concurrency, fitting))
        self._more_seconds = manifest.layout.products * _PRODUCT_SECONDS

    async def infer(self, embeddings: NDArray[np.float64], call: _Call) -> list[_Row]:
        """Logits, or an error, for each row of embeddings [batch, d]."""
        rows: list[_Row] = [NotSentError("not sent")] * len(embeddings)

        async def one(index: int) -> None:
            async with self._slots:
                rows[index] = await self._infer_row(embeddings[index], call)

        async with anyio.create_task_group() as tasks:
            for index in range(len(embeddings)):
                tasks.start_soon(one, index)
        return rows

    async def _infer_row(self, embedding: NDArray[np.float64], call: _Call) -> _Row:
        if call.hopeless is not None:
            return NotSentError(
                f"not sent, since an earlier row failed for all of them: {call.hopeless}"
            )
        started = time.perf_counter()
        query = self.session.encrypt(embedding)
        encrypted = time.perf_counter()
        try:
            answer, waited = await self._ask(query.key, query.data)
        except ReplyError as error:
            return error
        except (TransportError, ServiceResponseError) as error:
            call.hopeless = error
            return error
        received = time.perf_counter()
        try:
            logits = self.session.decrypt(query, answer.body)
        except WireError as error:
            return ReplyError(f"the service's reply was refused: {error}")
        if self.on_query is not None:
            self.on_query(
                QueryTrace(
                    encrypt_seconds=encrypted - started,
                    round_trip_seconds=waited,
                    evaluate_seconds=answer.evaluate_seconds,
                    decrypt_seconds=time.perf_counter() - received,
                    key_bytes=len(query.key.message),
                    query_bytes=len(query.data),
                    reply_bytes=len(answer.body),
                )
            )
        return logits

    async def _ask(self, key: SecretKey, query: bytes) -> tuple[Answer, float]:
        """The answer to a query and the seconds it took; registers the key as often as needed."""
        for attempt in range(1, _REGISTRATIONS + 1):
            await self._register(key)
            started = time.perf_counter()
            try:
                answer = await self.transport.infer(
                    self.model,
                    query,
                    self.session.reply_bytes,
                    more_seconds=self._more_seconds,
                )
            except ServiceResponseError as error:
                if error.problem != "key-not-registered" or attempt == _REGISTRATIONS:
                    raise
                self._registered.discard(key)
            else:
                return answer, time.perf_counter() - started
        raise AssertionError("the last attempt returns or raises")

    async def _register(self, key: SecretKey) -> None:
        async with self._registration:
            if key not in self._registered:
                await self.transport.put_key(key.id, key.message)
                self._registered.add(key)

    async def close(self) -> None:
        """Drop the keys, here and (as far as it listens) at the service."""
        with suppress(httpx2.HTTPError), anyio.move_on_after(_GOODBYE_SECONDS):
            for key in list(self._registered):
                await self.transport.delete_key(key.id)
        self.session.forget()


class Client:
    """A private model, ready to classify: the text and its embedding never leave this process.

    The client may be used from several threads. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        backbone: str | Path | None = None,
        device: str = "auto",
        digest: str | None = None,
        minimum_parameters: str = "compact",
        vendor_key: str | Sequence[str] | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 30.0,
        on_query: Callable[[QueryTrace], None] | None = None,
        on_download: Callable[[str, int], None] | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """Connect, and pin the model's manifest for the life of this client.

        Args:
            url: the service, https:// or on loopback.
            model: the model's name.
            backbone: directory of the backbone's files, when they need not be fetched; their
                digests are checked all the same.
            device: `auto` (CUDA, then MPS, then CPU), or a torch device.
            digest: the model version to accept, in hexadecimal; any when it is None.
            minimum_parameters: the weakest parameter set to accept, `compact` or `strong`.
            vendor_key: the vendor's public key, `ed25519:<base64>`, or several while the vendor
                changes it: manifests that none of them signed are refused. Without one, any
                manifest is believed (`digest` pins a single version all the same).
            api_key: the key that the vendor gave; VEILHEAD_API_KEY when it is None.
            concurrency: queries in flight at once; fewer for heads of a thousand classes or more.
            timeout: seconds to wait for each connection, write and read; reads of replies of such
                heads wait longer.
            on_query: called with the cost of every answered query, on another thread.
            on_download: called with path and size of each file of the backbone before it is
                fetched.
            transport: another HTTP transport, for tests and in-process services.

        Raises:
            InsecureTransportError: for plain HTTP to anything but loopback.
            InputError: when the API key is not one.
            AccessError: when the service wants another API key.
            ServiceResponseError: when the service knows no such model.
            TransportError: when it does not answer.
            ManifestError: when its manifest is not one, or not the pinned one.
            SignatureError: when no accepted vendor key signed it, or a vendor key is not one.
            ParameterError: when the model's parameters are below the minimum.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")
        vendor_keys = _vendor_keys(vendor_key)
        api_key = find_api_key(api_key)
        stack = ExitStack()
        # Closes at exit or when the client is collected; it must not hold the client itself.
        self._finalizer = weakref.finalize(self, stack.close)
        try:
            self._portal: BlockingPortal = stack.enter_context(start_blocking_portal())
            self._engine = stack.enter_context(
                self._portal.wrap_async_context_manager(
                    _opened(
                        url,
                        model,
                        digest=digest,
                        minimum_parameters=minimum_parameters,
                        vendor_keys=vendor_keys,
                        api_key=api_key,
                        concurrency=concurrency,
                        timeout=timeout,
                        on_query=on_query,
                        transport=transport,
                    )
                )
            )
        except BaseException:
            self._finalizer()
            raise
        self._device = device
        self._backbone_directory = None if backbone is None else Path(backbone)
        self._on_download = on_download
        self._backbone: Backbone | None = None
        self._backbone_lock = threading.Lock()

    @classmethod
    def local(cls, directory: str | Path, **options: Any) -> Client:
        """The same client, with the real service run in this process on an artefact directory.

        Takes the options of `Client`, but for `transport`. Needs `pip install 'veilhead[service]'`.

        Raises:
            StoreError: when the directory holds no artefact.
        """
        from veilhead.local import serve_locally

        service = serve_locally(Path(directory))
        options.setdefault("backbone", service.backbone)
        return cls(service.url, service.model, transport=service.transport, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the keys and the connections. Closing twice is allowed."""
        self._finalizer()

    def __repr__(self) -> str:
        manifest = self._engine.manifest
        return f"Client(model={manifest.name!r}, digest={manifest.digest.hex()[:12]!r})"

    @property
    def manifest(self) -> Manifest:
        """The pinned manifest: labels, error bound, parameters, policy."""
        return self._engine.manifest

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the logits."""
        return self.manifest.head.labels

    @overload
    def classify(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too
        self, texts: str, *, top_k: int | None = 1
    ) -> list[Prediction]: ...

    @overload
    def classify(
        self, texts: Sequence[str], *, top_k: int | None = 1
    ) -> list[list[Prediction]]: ...

    def classify(
        self, texts: str | Sequence[str], *, top_k: int | None = 1
    ) -> list[Prediction] | list[list[Prediction]]:
        """The best labels of a text, or of each text of a list, best first.

        Args:
            texts: one text, or a sequence of any length.
            top_k: labels for each text; None for all.

        Returns:
            A list of predictions for one text, a list of such lists for a sequence.

        Raises:
            NoBackboneError: when the model takes embeddings only.
            BackboneError: when the backbone cannot be loaded.
            BatchError: when rows of a sequence failed; it holds the answers of the others.
            VeilheadError: what went wrong with a single text.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {top_k}")
        backbone = self._ready_backbone()
        single = isinstance(texts, str)
        rows = [texts] if single else list(texts)
        errors: dict[int, VeilheadError] = {}
        logits = self._collect(_embedded(backbone, rows, errors), errors)
        if single and isinstance(logits[0], VeilheadError):
            raise logits[0]
        answers = _answers(
            [
                row if isinstance(row, VeilheadError) else predictions(row, self.labels, top_k)
                for row in logits
            ]
        )
        return answers[0] if single else answers

    def logits(self, embeddings: ArrayLike) -> NDArray[np.float64]:
        """Logits of embeddings that were made elsewhere.

        Args:
            embeddings: real numbers [batch, d], in the scale of the model that made them.

        Returns:
            float64 [batch, C], multiples of 2^-12.

        Raises:
            InputError: when the shape is wrong.
            BatchError: when rows failed (not finite, for instance); it holds the others' logits.
        """
        rows = _as_rows(embeddings, self.manifest.head.dimensions)
        collected = self._collect(
            (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)), {}
        )
        answers = _answers(collected)
        return np.array(answers, dtype=np.float64).reshape(len(rows), len(self.labels))

    def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Embeddings [len(texts), d] of texts, by the public backbone, on this machine.

        Raises:
            NoBackboneError: when the model takes embeddings only.
            BackboneError: when the backbone cannot be loaded.
        """
        return self._ready_backbone().embed(list(texts))

    def _collect(
        self,
        chunks: Iterable[NDArray[np.float64]],
        errors: Mapping[int, VeilheadError],
    ) -> list[_Row]:
        """Logits or an error for every row of chunks [<= _CHUNK, d], which are made as they go out.

        Everything is sent before any error is seen. Errors of rows that failed locally, by row
        number, take the place of their answers.
        """
        call = _Call()
        results: list[_Row] = []
        pending: list[Future[list[_Row]]] = []
        broken: list[bool] = []
        for chunk in chunks:
            broken += [not np.isfinite(row).all() for row in chunk]
            pending.append(self._portal.start_task_soon(self._engine.infer, chunk, call))
            if len(pending) >= _CHUNKS_IN_FLIGHT:
                results += pending.pop(0).result()
        for future in pending:
            results += future.result()
        for index, is_broken in enumerate(broken):
            if is_broken:
                results[index] = NotFiniteError("the embedding holds NaN or infinity")
        for index, error in errors.items():
            results[index] = error
        return results

    def _ready_backbone(self) -> Backbone:
        """The loaded backbone; the first caller fetches and loads it."""
        section = self.manifest.backbone
        if section is None:
            raise NoBackboneError(
                f"the model {self.manifest.name!r} has no backbone: make embeddings of "
                f"{self.manifest.head.dimensions} values yourself and call `logits`"
            )
        with self._backbone_lock:
            if self._backbone is None:
                from veilhead_models.backbone import Backbone

                directory = self._backbone_directory
                if directory is None:
                    directory = self._portal.call(self._fetch_backbone)
                self._backbone = Backbone.load(directory, section, device=self._device)
            return self._backbone

    async def _fetch_backbone(self) -> Path:
        return await fetch_backbone(
            self._engine.transport,
            self.manifest,
            progress=self._on_download,
        )


@asynccontextmanager
async def _opened(
    url: str,
    model: str,
    *,
    digest: str | None,
    minimum_parameters: str,
    vendor_keys: Sequence[VendorKey],
    api_key: str | None,
    concurrency: int,
    timeout: float,
    on_query: Callable[[QueryTrace], None] | None,
    transport: httpx2.AsyncBaseTransport | None,
) -> AsyncIterator[_Engine]:
    async with Transport(
        url, timeout=timeout, connections=concurrency, api_key=api_key, transport=transport
    ) as connection:
        engine = _Engine(connection, model, concurrency, on_query)
        await engine.open(digest, minimum_parameters, vendor_keys)
        try:
            yield engine
        finally:
            await engine.close()


def _vendor_keys(given: str | Sequence[str] | None) -> tuple[VendorKey, ...]:
    """The keys of `vendor_key`. An empty list is refused: it would read as "check nothing"."""
    if given is None:
        return ()
    texts = [given] if isinstance(given, str) else list(given)
    if not texts:
        raise SignatureError("got no vendor key in the list, expected at least one, or None")
    return tuple(map(VendorKey.parse, texts))


def _embedded(
    backbone: Backbone, texts: Sequence[Any], errors: dict[int, VeilheadError]
) -> Iterator[NDArray[np.float64]]:
    """Embeddings [<= _CHUNK, d] of the texts, chunk by chunk.

    A text that cannot be embedded becomes zeros, so that the service sees no difference, and an
    entry in `errors` by row number.
    """
    for start in range(0, len(texts), _CHUNK):
        chunk = []
        for index, text in enumerate(texts[start : start + _CHUNK], start):
            error = _unusable(text)
            if error is not None:
                errors[index] = error
            chunk.append("" if error is not None else text)
        try:
            embeddings = backbone.embed(chunk)
        except Exception as error:  # out of memory, say: whatever torch raises
            failure = BackboneError(
                f"the backbone failed on the texts of rows {start} to {start + len(chunk) - 1}: "
                f"{type(error).__name__}"
            )
            for index in range(start, start + len(chunk)):
                errors.setdefault(index, failure)
            embeddings = np.zeros((len(chunk), backbone.dimensions))
        for index in errors:
            if start <= index:
                embeddings[index - start] = 0.0
        yield embeddings


def _unusable(text: Any) -> InputError | None:
    """Why a row is not a text, or None when it is one."""
    if not isinstance(text, str):
        return InputError(f"expected a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return InputError("the text holds half of a surrogate pair: decode it as UTF-8 again")
    return None


def _as_rows(embeddings: ArrayLike, dimensions: int) -> NDArray[np.float64]:
    """Embeddings as float64 [batch, d].

    Raises:
        InputError: when they are not.
    """
    array = np.asarray(embeddings)
    if array.ndim != 2 or array.shape[1] != dimensions or array.dtype.kind not in "fiub":
        raise InputError(
            f"got an array of shape {list(array.shape)} and type {array.dtype}, "
            f"expected real numbers of shape [batch, {dimensions}]"
        )
    return array.astype(np.float64)


def _answers(rows: Sequence[Any]) -> list[Any]:
    """The rows, when none of them is an error.

    Raises:
        BatchError: when any is; it holds the others.
    """
    errors = {index: row for index, row in enumerate(rows) if isinstance(row, VeilheadError)}
    if errors:
        results = [None if index in errors else row for index, row in enumerate(rows)]
        raise BatchError(results, errors)
    return list(rows)
