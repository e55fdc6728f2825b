"""The client: text in, labels out, and nothing but ciphertexts in between."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, overload

import httpx2
import numpy as np
from anyio.from_thread import BlockingPortal, start_blocking_portal
from numpy.typing import ArrayLike, NDArray

from veilhead.api_key import find_api_key
from veilhead.backbone_cache import fetch_backbone
from veilhead.engine import Call, QueryTrace, Row, opened_engine
from veilhead.predictions import Prediction, predictions
from veilhead_protocol.errors import (
    BackboneError,
    BatchError,
    InputError,
    NoBackboneError,
    NotFiniteError,
    SignatureError,
    VeilheadError,
)
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.signatures import VendorKey

if TYPE_CHECKING:
    from veilhead_models.backbone import Backbone

#: Chunks on the wire at once: what bounds the memory of a long call.
_CHUNKS_IN_FLIGHT: Final = 8


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
                    opened_engine(
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
        logits = self._collect(_embedded(backbone, rows, self._engine.chunk, errors), errors)
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
        size = self._engine.chunk
        collected = self._collect(
            (rows[start : start + size] for start in range(0, len(rows), size)), {}
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
    ) -> list[Row]:
        """Logits or an error for every row of chunks [rows, d], which are made as they go out.

        Everything is sent before any error is seen. Errors of rows that failed locally, by row
        number, take the place of their answers.
        """
        call = Call()
        results: list[Row] = []
        pending: list[Future[list[Row]]] = []
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


def _vendor_keys(given: str | Sequence[str] | None) -> tuple[VendorKey, ...]:
    """The keys of `vendor_key`. An empty list is refused: it would read as "check nothing"."""
    if given is None:
        return ()
    texts = [given] if isinstance(given, str) else list(given)
    if not texts:
        raise SignatureError("got no vendor key in the list, expected at least one, or None")
    return tuple(map(VendorKey.parse, texts))


def _embedded(
    backbone: Backbone, texts: Sequence[Any], size: int, errors: dict[int, VeilheadError]
) -> Iterator[NDArray[np.float64]]:
    """Embeddings [<= size, d] of the texts, chunk by chunk.

    A text that cannot be embedded becomes zeros, so that the service sees no difference, and an
    entry in `errors` by row number.
    """
    for start in range(0, len(texts), size):
        chunk = []
        for index, text in enumerate(texts[start : start + size], start):
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
