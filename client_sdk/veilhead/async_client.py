"""The client for asyncio: what a `Client` does, without a thread of its own.

`Client` runs one of these on an event loop in a thread: every behaviour is written once, here.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, overload

import anyio
import httpx2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from veilhead.api_key import find_api_key
from veilhead.backbone_cache import fetch_backbone
from veilhead.deidentify import Deidentifier, chosen_deidentifier
from veilhead.engine import Call, Engine, QueryTrace, Row, opened_engine
from veilhead.predictions import FunctionToApply, Prediction, Shape, default_function, scores
from veilhead.rows import (
    EmbeddedRow,
    TokenRows,
    as_rows,
    embed_token_rows,
    embedded_rows,
    named,
    raise_errors,
)
from veilhead.runtimes import Runtime, check_runtime, plan_backbone
from veilhead.subnormals import flush_subnormals
from veilhead.tokens import AggregationStrategy, Entity, TokenLogits, TokenShape
from veilhead.transport import NOT_HERE, check_url
from veilhead.window import Window
from veilhead_protocol.copies import keep_for_ever, process_mark
from veilhead_protocol.errors import (
    BackboneError,
    CallTimeoutError,
    ClientError,
    InputError,
    NoBackboneError,
    SignatureError,
    VeilheadError,
)
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.signatures import VendorKey

if TYPE_CHECKING:
    import pandas as pd

    from veilhead_models.embedder import Embedder

#: Chunks of rows under way at once: what bounds the memory of a long call.
CHUNKS: Final = 8

_Value = TypeVar("_Value")
_Made = TypeVar("_Made")
_Text = TypeVar("_Text")

#: Predictions of a text, best first, or why there are none.
Answer = list[Prediction] | VeilheadError


class AsyncClient:
    """A `Client` whose methods are awaited: the same arguments, answers and errors.

    It connects when it is entered (`async with`), belongs to the event loop of that moment, and may
    be used from any number of its tasks. A task that is cancelled leaves it usable. asyncio only.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        backbone: str | Path | None = None,
        backbone_runtime: Runtime = "auto",
        device: str = "auto",
        digest: str | None = None,
        minimum_parameters: str = "standard",
        vendor_key: str | Sequence[str] | None = None,
        api_key: str | None = None,
        deidentify: bool | Deidentifier | None = None,
        pad_batches: bool = False,
        fresh_keys: bool = False,
        embed_first: bool = False,
        prepare: bool = True,
        concurrency: int = 8,
        timeout: float = 30.0,
        call_timeout: float | None = None,
        on_query: Callable[[QueryTrace], None] | None = None,
        on_download: Callable[[str, int], None] | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """Check the arguments, which are those of `Client`. Nothing is sent before `async with`.

        Raises:
            InsecureTransportError: for plain HTTP to anything but loopback.
            InputError: when the API key is not one.
            SignatureError: when a vendor key is not one.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")
        for name, seconds in (
            ("timeout", timeout),
            ("call_timeout", 1.0 if call_timeout is None else call_timeout),
        ):
            if not 0 < seconds < float("inf"):
                raise ValueError(f"{name} must be a number of seconds above 0, got {seconds}")
        check_url(url)
        check_runtime(backbone_runtime)
        self._opening = partial(
            opened_engine,
            url,
            model,
            digest=digest,
            minimum_parameters=minimum_parameters,
            vendor_keys=_vendor_keys(vendor_key),
            api_key=find_api_key(api_key),
            pad_batches=pad_batches,
            fresh_keys=fresh_keys,
            prepare=prepare,
            concurrency=concurrency,
            timeout=timeout,
            call_timeout=call_timeout,
            on_query=on_query,
            transport=transport,
        )
        self._model = model
        self._call_timeout = call_timeout
        self._embed_first = embed_first
        self._deidentify = deidentify
        self._deidentifier: Deidentifier | None = None
        self._runtime: Runtime = backbone_runtime
        self._device = device
        self._backbone_directory = None if backbone is None else Path(backbone)
        self._on_download = on_download
        self._process = process_mark()
        self._stack = AsyncExitStack()
        weakref.finalize(self, _abandon_copy, self._stack, self._process)
        self._connected: Engine | None = None
        self._closed = False
        self._windows: weakref.WeakSet[Window[Any, Any]] = weakref.WeakSet()
        self._backbone: Embedder | None = None
        self._backbone_lock = asyncio.Lock()
        # One thread, since a backbone takes one batch at a time and uses every core for it.
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="veilhead-backbone", initializer=flush_subnormals
        )
        # Another, since the time that it takes to make an answer depends on what was decrypted: no
        # request of this call or of others waits for it.
        self._answers_thread = ThreadPoolExecutor(1, thread_name_prefix="veilhead-answers")

    @classmethod
    def local(cls, directory: str | Path, **options: Any) -> AsyncClient:
        """As `Client.local`.

        Raises:
            StoreError: when the directory holds no artefact.
        """
        from veilhead.local import serve_locally

        service = serve_locally(Path(directory))
        options.setdefault("backbone", service.backbone)
        return cls(service.url, service.model, transport=service.transport, **options)

    async def __aenter__(self) -> Self:
        """Connect, and pin the model's manifest for the life of this client.

        Raises:
            AccessError: when the service wants another API key.
            ServiceResponseError: when the service knows no such model.
            TransportError: when it does not answer, not in time, or the environment's proxy cannot
                be used.
            ManifestError: when its manifest is not one, or not the pinned one.
            SignatureError: when no accepted vendor key signed it.
            ParameterError: when the model's parameters are below the minimum.
            ClientError: when de-identification lacks `phonenumbers`.
        """
        self._check_process()
        if self._connected is not None or self._closed:
            raise ClientError("a client is entered once: make another one")
        connected = await self._stack.enter_async_context(self._opening())
        try:
            self._deidentifier = chosen_deidentifier(self._deidentify, connected.manifest)
        except ClientError:
            await self.close()
            raise
        self._connected = connected
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Drop the keys and the connections. Closing twice is allowed.

        In another process than the client was made in, nothing is done: they are still in use.
        """
        self._closed = True
        if self._process != process_mark():
            return
        for window in list(self._windows):
            await window.cancel()
        for thread in (self._thread, self._answers_thread):
            thread.shutdown(wait=False, cancel_futures=True)
        await self._stack.aclose()

    def __reduce__(self) -> Any:
        raise ClientError(NOT_HERE)

    def __repr__(self) -> str:
        if self._connected is None:
            return f"{type(self).__name__}(model={self._model!r}, not connected)"
        digest = self.manifest.digest.hex()[:12]
        return f"{type(self).__name__}(model={self._model!r}, digest={digest!r})"

    @property
    def manifest(self) -> Manifest:
        """The pinned manifest: labels, error bound, parameters, policy."""
        if self._connected is None:
            raise ClientError("the client is not connected: use it in `async with`")
        return self._connected.manifest

    async def _probe(self) -> None:
        """Ask the service once whether it is ready. Nothing of a text or a key is sent.

        Raises:
            TransportError: when it does not answer.
            ServiceResponseError: when it answers that it is not ready.
        """
        if self._connected is None:
            raise ClientError("the client is not connected: use it in `async with`")
        await self._connected.transport.probe()

    @property
    def deidentifier(self) -> Deidentifier | None:
        """What texts go through before they are embedded; None when it is nothing."""
        return self._deidentifier

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the logits."""
        return self.manifest.head.labels

    @overload
    async def classify(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too
        self,
        texts: str,
        *,
        top_k: int | None = 1,
        function_to_apply: FunctionToApply | None = None,
    ) -> list[Prediction]: ...

    @overload
    async def classify(
        self,
        texts: Sequence[str],
        *,
        top_k: int | None = 1,
        function_to_apply: FunctionToApply | None = None,
    ) -> list[list[Prediction]]: ...

    async def classify(
        self,
        texts: str | Sequence[str],
        *,
        top_k: int | None = 1,
        function_to_apply: FunctionToApply | None = None,
    ) -> list[Prediction] | list[list[Prediction]]:
        """As `Client.classify`."""
        shape = Shape.of(self.manifest.head, top_k, function_to_apply)
        single = isinstance(texts, str)
        rows = await self._logits_of([texts] if single else texts)
        found = await self._answers(rows, shape)
        if single and isinstance(found[0], VeilheadError):
            raise found[0]
        raise_errors(found)
        answers = [answer for answer in found if not isinstance(answer, VeilheadError)]
        return answers[0] if single else answers

    def classify_many(
        self,
        texts: Iterable[str] | AsyncIterable[str],
        *,
        top_k: int | None = 1,
        function_to_apply: FunctionToApply | None = None,
        concurrency: int = CHUNKS,
        progress: Callable[[int], Any] | None = None,
        start: int = 0,
    ) -> AsyncGenerator[list[Prediction] | VeilheadError]:
        """As `Client.classify_many`; `texts` may be asynchronous too."""
        stream = self._stream(texts, top_k, function_to_apply, concurrency, start)
        return self._streamed(stream, texts, progress)

    async def _streamed(
        self,
        stream: Stream,
        texts: Iterable[Any] | AsyncIterable[Any],
        progress: Callable[[int], Any] | None,
    ) -> AsyncGenerator[Answer]:
        try:
            async for chunk in _chunks(texts, stream.chunk):
                for answer in reported(await stream.send(chunk), progress):
                    yield answer
            while rest := await stream.rest():
                for answer in reported(rest, progress):
                    yield answer
        finally:
            await stream.cancel()

    @overload
    async def classify_tokens(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too
        self,
        texts: str,
        *,
        aggregation_strategy: AggregationStrategy = "none",
        ignore_labels: Sequence[str] = ("O",),
        stride: int | None = None,
    ) -> list[Entity]: ...

    @overload
    async def classify_tokens(
        self,
        texts: Sequence[str],
        *,
        aggregation_strategy: AggregationStrategy = "none",
        ignore_labels: Sequence[str] = ("O",),
        stride: int | None = None,
    ) -> list[list[Entity]]: ...

    async def classify_tokens(
        self,
        texts: str | Sequence[str],
        *,
        aggregation_strategy: AggregationStrategy = "none",
        ignore_labels: Sequence[str] = ("O",),
        stride: int | None = None,
    ) -> list[Entity] | list[list[Entity]]:
        """As `Client.classify_tokens`."""
        self._check_task("token-classification")
        shape = TokenShape.of(self.labels, aggregation_strategy, ignore_labels, stride)
        call = Call(self._call_timeout)
        backbone = await call.in_time(self._ready_backbone())
        single = isinstance(texts, str)
        embeds = [
            partial(embed_token_rows, backbone, text, row, shape.stride, self._deidentifier)
            for row, text in enumerate([texts] if single else texts)
        ]
        if self._embed_first:
            whole = await self._on_backbone_thread(lambda: [embed() for embed in embeds])
            embeds = [partial(_given, rows) for rows in whole]
        found = await self._collect(partial(self._infer_tokens, embed, call) for embed in embeds)

        def entities(row: TokenLogits | VeilheadError) -> list[Entity] | VeilheadError:
            return row if isinstance(row, VeilheadError) else shape.entities(row, backbone.join)

        rows = await self._on_answers_thread(lambda: [entities(row) for row in found])
        if single and isinstance(rows[0], VeilheadError):
            raise rows[0]
        raise_errors(rows)
        answers = [row for row in rows if not isinstance(row, VeilheadError)]
        return answers[0] if single else answers

    async def predict(self, texts: Sequence[str]) -> list[str]:
        """As `Client.predict`."""
        return [row[0].label for row in await self.classify(list(texts))]

    async def predict_proba(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """As `Client.predict_proba`."""
        function = default_function(self.manifest.head)
        if function == "none":
            raise InputError(f"the model {self._model!r} predicts numbers, not probabilities")
        logits = self._stacked(await self._logits_of(texts))
        return await self._on_answers_thread(lambda: scores(logits, function))

    async def classify_frame(
        self,
        texts: pd.Series,
        *,
        top_k: int = 1,
        function_to_apply: FunctionToApply | None = None,
    ) -> pd.DataFrame:
        """As `Client.classify_frame`."""
        from veilhead.frames import as_frame

        shape = Shape.of(self.manifest.head, top_k, function_to_apply)
        rows = await self._logits_of(list(texts))
        return await self._on_answers_thread(
            lambda: as_frame(texts.index, [_answer(row, shape) for row in rows], shape)
        )

    async def logits(self, embeddings: ArrayLike) -> NDArray[np.float64]:
        """As `Client.logits`."""
        rows = as_rows(embeddings, self.manifest.head.dimensions)
        call, size = Call(self._call_timeout), self._engine.chunk
        return self._stacked(
            await self._collect(
                partial(self._infer, rows[start : start + size], call)
                for start in range(0, len(rows), size)
            )
        )

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """As `Client.embed`."""
        backbone, rows = await self._ready_backbone(), list(texts)
        if (deidentifier := self._deidentifier) is not None:
            rows = [deidentifier(text).text for text in rows]
        return await self._on_backbone_thread(lambda: backbone.embed(rows))

    async def card(self) -> str:
        """As `Client.card`."""
        return await Call(self._call_timeout).in_time(self._engine.card())

    def _check_process(self) -> None:
        """Refuse work in a copy of the process that made the client.

        The other one has the same connections, and the event loop stayed there.
        """
        if self._process != process_mark():
            raise ClientError(NOT_HERE)

    @property
    def _engine(self) -> Engine:
        self._check_process()
        if self._connected is None:
            raise ClientError("the client is not connected: use it in `async with`")
        if self._closed:
            raise ClientError("the client is closed: make another one")
        return self._connected

    def _stream(
        self,
        texts: object,
        top_k: int | None,
        function_to_apply: FunctionToApply | None,
        concurrency: int,
        start: int,
    ) -> Stream:
        if isinstance(texts, str):
            raise InputError("got one string, expected an iterable of texts: put it into a list")
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")
        self._check_task("text-classification")
        shape = Shape.of(self.manifest.head, top_k, function_to_apply)
        return Stream(self, shape, concurrency, start)

    def _check_task(self, task: str) -> None:
        self._check_process()
        if self.manifest.task != task:
            method = "classify_tokens" if task == "text-classification" else "classify"
            raise InputError(
                f"the model {self._model!r} is for {self.manifest.task}, not {task}: "
                f"call `{method}`"
            )

    def _window(
        self, limit: int, finish: Callable[[list[_Value]], Awaitable[list[_Made]]]
    ) -> Window[_Value, _Made]:
        window = Window(limit, finish)
        self._windows.add(window)
        return window

    async def _answers(self, rows: list[Row], shape: Shape) -> list[Answer]:
        return await self._on_answers_thread(lambda: [_answer(row, shape) for row in rows])

    def _stacked(self, rows: list[Row]) -> NDArray[np.float64]:
        """Logits [rows, C], when no row is an error."""
        raise_errors(rows)
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self.labels))

    async def _logits_of(self, texts: Sequence[Any]) -> list[Row]:
        """Logits or an error for every text. Everything is sent before any error is seen."""
        self._check_task("text-classification")
        call = Call(self._call_timeout)
        backbone = await call.in_time(self._ready_backbone())
        texts = list(texts)
        rows = embedded_rows(backbone, texts, self._deidentifier)
        if self._embed_first:
            rows = iter(await self._on_backbone_thread(partial(list, rows)))
        # Otherwise a request goes out as soon as its rows are embedded.
        size = self._engine.chunk
        return _in_order(
            await self._collect(
                partial(self._infer_next, rows, min(size, len(texts) - start), call)
                for start in range(0, len(texts), size)
            ),
            len(texts),
            call,
        )

    async def _collect(
        self, chunks: Iterable[Callable[[], Coroutine[Any, Any, list[_Value]]]]
    ) -> list[_Value]:
        window: Window[_Value, _Value] = self._window(CHUNKS, _as_they_are)
        rows: list[_Value] = []
        try:
            for chunk in chunks:
                rows += await window.start(chunk)
            while rest := await window.rest():
                rows += rest
        finally:
            await window.cancel()
        return rows

    async def _infer_texts(self, backbone: Embedder, texts: Sequence[Any], call: Call) -> list[Row]:
        """Logits or an error for each of the texts of one chunk."""
        rows = embedded_rows(backbone, texts, self._deidentifier)
        return _in_order(await self._infer_next(rows, len(texts), call), len(texts), call)

    async def _infer_next(
        self, rows: Iterator[EmbeddedRow], count: int, call: Call
    ) -> list[tuple[int, Row]]:
        """The places of the next rows, and logits or an error for each; none once all is lost."""
        if call.hopeless is not None:  # nothing would be sent: do not embed either
            return []
        try:
            taken = await call.in_time(self._on_backbone_thread(lambda: list(islice(rows, count))))
        except CallTimeoutError:
            return []
        answers = await self._infer(np.array([row.embedding for row in taken]), call)
        return [
            (row.place, answer if row.error is None else row.error)
            for row, answer in zip(taken, answers, strict=True)
        ]

    async def _infer_tokens(
        self, embed: Callable[[], TokenRows], call: Call
    ) -> list[TokenLogits | VeilheadError]:
        """The logits of one text's tokens, which are sent together, or an error: one row."""
        if call.hopeless is not None:
            return [call.not_sent()]
        try:
            rows = await call.in_time(self._on_backbone_thread(embed))
        except CallTimeoutError as late:
            return [late]
        logits = await self._infer(rows.embeddings, call)
        failed = next((found for found in logits if isinstance(found, VeilheadError)), None)
        failed = failed if rows.error is None else rows.error
        if failed is not None:
            return [failed]
        made = np.array(logits, dtype=np.float64).reshape(-1, len(self.labels))  # [tokens, C]
        ends = np.cumsum([len(tokens) for tokens in rows.windows])
        parts = np.split(made, ends[:-1]) if rows.windows else []
        return [list(zip(rows.windows, parts, strict=True))]

    async def _infer(self, embeddings: NDArray[np.float64], call: Call) -> list[Row]:
        """Logits or an error for each row of embeddings [<= chunk, d]."""
        return await self._engine.infer(embeddings, call)

    async def _ready_backbone(self) -> Embedder:
        """The loaded backbone; the first caller fetches and loads it."""
        engine, section = self._engine, self.manifest.backbone
        if section is None:
            raise NoBackboneError(
                f"the model {self._model!r} has no backbone: make embeddings of "
                f"{self.manifest.head.dimensions} values yourself and call `logits`"
            )
        async with self._backbone_lock:
            if self._backbone is not None:
                return self._backbone
            plan = plan_backbone(section, self._runtime, self._device)
            directory = self._backbone_directory
            if directory is None:
                directory = await fetch_backbone(
                    engine.transport, self.manifest, plan.files, progress=self._on_download
                )
            # A call whose time is over meanwhile leaves it to the next.
            with anyio.CancelScope(shield=True):
                loaded = await self._on_backbone_thread(partial(plan.load, directory))
            if loaded.dimensions != self.manifest.head.dimensions:
                raise BackboneError(
                    f"the backbone makes {loaded.dimensions} values, the head of the model "
                    f"{self._model!r} takes {self.manifest.head.dimensions}: the vendor's manifest "
                    "is inconsistent"
                )
            self._backbone = loaded
            return loaded

    async def _on_backbone_thread(self, work: Callable[[], _Value]) -> _Value:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _on_answers_thread(self, work: Callable[[], _Value]) -> _Value:
        if self._closed:
            raise ClientError("the client was closed while a call was under way")
        return await asyncio.get_running_loop().run_in_executor(self._answers_thread, work)


class Stream:
    """Texts that come chunk by chunk, and their answers in the same order.

    Attributes:
        chunk: texts that are best sent together.
    """

    def __init__(self, client: AsyncClient, shape: Shape, concurrency: int, start: int) -> None:
        self._client = client
        self._window: Window[Row, Answer] = client._window(
            concurrency, lambda rows: client._answers(rows, shape)
        )
        self._call = Call(client._call_timeout, each_chunk=True)
        self._answered = start
        self.chunk = client._engine.chunk

    async def send(self, texts: Sequence[Any]) -> list[Answer]:
        """Start a chunk; the answers of earlier ones that are due."""
        backbone = await self._client._ready_backbone()
        infer = partial(self._client._infer_texts, backbone, texts, self._call)
        return self._numbered(await self._window.start(infer))

    async def rest(self) -> list[Answer]:
        """The next chunk's answers; none once there are no more."""
        self._client._check_process()
        return self._numbered(await self._window.rest())

    async def cancel(self) -> None:
        """Stop whatever is under way, unless that is in another process."""
        if self._client._process == process_mark():
            await self._window.cancel()

    def _numbered(self, answers: list[Answer]) -> list[Answer]:
        first, self._answered = self._answered, self._answered + len(answers)
        return [
            named(answer, number) if isinstance(answer, VeilheadError) else answer
            for number, answer in enumerate(answers, first)
        ]


def _abandon_copy(stack: object, process: int) -> None:
    """In a copied process, leave what the client holds as it is: another process uses it.

    To close a connection here, or to free it, takes it off the list of those that the other
    process's event loop waits for (epoll(7)): there, no answer would arrive any more.
    """
    if process != process_mark():
        keep_for_ever(stack)


def reported(answers: list[Answer], progress: Callable[[int], Any] | None) -> list[Answer]:
    """The answers, whose number `progress` is told."""
    if answers and progress is not None:
        progress(len(answers))
    return answers


async def _as_they_are(rows: list[_Value]) -> list[_Value]:
    return rows


def _given(rows: TokenRows) -> TokenRows:
    return rows


def _answer(row: Row, shape: Shape) -> Answer:
    return row if isinstance(row, VeilheadError) else shape.predictions(row)


def _in_order(found: list[tuple[int, Row]], count: int, call: Call) -> list[Row]:
    """The rows by their places, `count` of them; those that are missing were not sent."""
    rows: dict[int, Row] = dict(found)
    return [rows[place] if place in rows else call.not_sent() for place in range(count)]


async def _chunks(
    texts: Iterable[_Text] | AsyncIterable[_Text], size: int
) -> AsyncIterator[list[_Text]]:
    """The texts, `size` at a time."""
    chunk: list[_Text] = []
    async for text in texts if isinstance(texts, AsyncIterable) else _each(texts):
        chunk.append(text)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


async def _each(texts: Iterable[_Text]) -> AsyncIterator[_Text]:
    for text in texts:
        yield text


def _check_seconds(name: str, seconds: float) -> None:
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{name} must be a number of seconds above 0, got {seconds}")


def _vendor_keys(given: str | Sequence[str] | None) -> tuple[VendorKey, ...]:
    """The keys of `vendor_key`. An empty list is refused: it would read as "check nothing"."""
    if given is None:
        return ()
    texts = [given] if isinstance(given, str) else list(given)
    if not texts:
        raise SignatureError("got no vendor key in the list, expected at least one, or None")
    return tuple(map(VendorKey.parse, texts))
