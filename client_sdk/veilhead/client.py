"""The client: text in, labels out, and nothing but ciphertexts in between."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

import httpx2
import numpy as np
from anyio.from_thread import BlockingPortal, start_blocking_portal
from numpy.typing import ArrayLike, NDArray

from veilhead.async_client import CHUNKS, Answer, AsyncClient, Stream, reported
from veilhead.deidentify import Deidentifier
from veilhead.engine import Engine, QueryTrace
from veilhead.predictions import FunctionToApply, Prediction
from veilhead.runtimes import Runtime
from veilhead.tokens import AggregationStrategy, Entity
from veilhead_protocol.copies import keep_for_ever, process_mark
from veilhead_protocol.errors import ClientError, VeilheadError
from veilhead_protocol.manifest import Manifest

if TYPE_CHECKING:
    import pandas as pd

_Value = TypeVar("_Value")


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
        """Connect, and pin the model's manifest for the life of this client.

        Args:
            url: the service, https:// or on loopback.
            model: the model's name.
            backbone: directory of the backbone's files, when they need not be fetched; their
                digests are checked all the same.
            backbone_runtime: `torch`, `onnx` (needs no torch; the model must be published for it),
                `onnx-fp16` (half the size to fetch, a little less exact), or `auto`: torch where
                it is installed, and else ONNX Runtime.
            device: `auto` (CUDA, then MPS, then CPU), or a torch device; of ONNX Runtime `auto`,
                `cpu`, `cuda` or `cuda:N`.
            digest: the model version to accept, in hexadecimal; any when it is None.
            minimum_parameters: the weakest parameter set to accept, `standard` or `compact`.
            vendor_key: the vendor's public key, `ed25519:<base64>`, or several while the vendor
                changes it: manifests that none of them signed are refused. Without one, any
                manifest is believed (`digest` pins a single version all the same).
            api_key: the key that the vendor gave; VEILHEAD_API_KEY when it is None.
            deidentify: replace e-mail addresses, account numbers and the like by placeholders
                before a text is embedded: True for the built-in detectors, or a `Deidentifier`.
                None follows the model's policy, and False never does.
            pad_batches: add decoys until the number of rows is a power of two, so that sizes tell
                less of it. The service charges for them too.
            fresh_keys: never encrypt two queries under one key. Use it where other people see
                answers: the answers to one query tell of its key, and would open every query under
                it. It costs a key message more in each query, and no round trip.
            embed_first: embed all texts of a call before any is sent (of `classify_many` all of a
                chunk). Otherwise the longest are sent while others are embedded, and the gaps
                between the requests are a profile of the texts' lengths.
            prepare: encrypt zeros ahead while the client is idle, which makes the next query
                faster. False is for a process that may be resumed twice from one snapshot or
                checkpoint, which no process can notice: both would use the same zeros.
            concurrency: queries in flight at once; fewer for heads of a thousand classes or more.
            timeout: seconds that each attempt of a request may take in all, until its answer is
                read; those at such heads may take longer. Files of the backbone may take any time
                that brings 4,096 bytes for each second, judged over `timeout` seconds.
            call_timeout: seconds that each call may take in all, this one too: rows without an
                answer fail with CallTimeoutError then, and the others keep theirs. With
                `classify_many` so long may the service take with each chunk. None: five attempts of
                each request, and the pauses between them.
            on_query: called with the cost of every answered query, on another thread.
            on_download: called with path and size of each file of the backbone before it is
                fetched.
            transport: another HTTP transport, for tests and in-process services.

        Raises:
            InsecureTransportError: for plain HTTP to anything but loopback.
            InputError: when the API key is not one.
            AccessError: when the service wants another API key.
            ServiceResponseError: when the service knows no such model.
            TransportError: when it does not answer, not in time, or the environment's proxy cannot
                be used.
            ManifestError: when its manifest is not one, or not the pinned one.
            SignatureError: when no accepted vendor key signed it, or a vendor key is not one.
            ParameterError: when the model's parameters are below the minimum.
            ClientError: when de-identification lacks `phonenumbers`.
        """
        self._client = AsyncClient(
            url,
            model,
            backbone=backbone,
            backbone_runtime=backbone_runtime,
            device=device,
            digest=digest,
            minimum_parameters=minimum_parameters,
            vendor_key=vendor_key,
            api_key=api_key,
            deidentify=deidentify,
            pad_batches=pad_batches,
            fresh_keys=fresh_keys,
            embed_first=embed_first,
            prepare=prepare,
            concurrency=concurrency,
            timeout=timeout,
            call_timeout=call_timeout,
            on_query=on_query,
            on_download=on_download,
            transport=transport,
        )
        self._process = process_mark()
        stack = ExitStack()
        # Closes at exit or when the client is collected; it must not hold the client itself.
        self._finalizer = weakref.finalize(self, _close, stack, self._process)
        try:
            self._portal: BlockingPortal = stack.enter_context(start_blocking_portal())
            self._loop = self._portal.call(_running_loop)
            stack.enter_context(self._portal.wrap_async_context_manager(self._client))
        except BaseException:
            self._finalizer()
            raise

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
        """Drop the keys and the connections. Closing twice is allowed.

        In another process than the client was made in, nothing is done: they are still in use.
        """
        self._finalizer()

    def __reduce__(self) -> Any:
        return self._client.__reduce__()  # which refuses

    def __repr__(self) -> str:
        return repr(self._client).removeprefix("Async")

    @property
    def manifest(self) -> Manifest:
        """The pinned manifest: labels, error bound, parameters, policy."""
        return self._client.manifest

    @property
    def deidentifier(self) -> Deidentifier | None:
        """What texts go through before they are embedded; None when it is nothing."""
        return self._client.deidentifier

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the logits."""
        return self._client.labels

    @overload
    def classify(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too
        self,
        texts: str,
        *,
        top_k: int | None = 1,
        function_to_apply: FunctionToApply | None = None,
    ) -> list[Prediction]: ...

    @overload
    def classify(
        self,
        texts: Sequence[str],
        *,
        top_k: int | None = 1,
        function_to_apply: FunctionToApply | None = None,
    ) -> list[list[Prediction]]: ...

    def classify(
        self,
        texts: str | Sequence[str],
        *,
        top_k: int | None = 1,
        function_to_apply: FunctionToApply | None = None,
    ) -> list[Prediction] | list[list[Prediction]]:
        """The best labels of a text, or of each text of a list, best first.

        Args:
            texts: one text, or a sequence of any length.
            top_k: labels for each text; None for all.
            function_to_apply: what makes scores of logits: `softmax` over all labels, `sigmoid` of
                each, or `none`. None is the model's own: sigmoid when its labels do not exclude
                each other or it has one only, none when it predicts numbers, softmax otherwise.

        Returns:
            A list of predictions for one text, a list of such lists for a sequence.

        Raises:
            NoBackboneError: when the model takes embeddings only.
            BackboneError: when the backbone cannot be loaded.
            BatchError: when rows of a sequence failed; it holds the answers of the others.
            VeilheadError: what went wrong with a single text.
        """
        return self._run(
            self._client.classify, texts, top_k=top_k, function_to_apply=function_to_apply
        )

    def classify_many(
        self,
        texts: Iterable[str],
        *,
        top_k: int | None = 1,
        function_to_apply: FunctionToApply | None = None,
        concurrency: int = CHUNKS,
        progress: Callable[[int], Any] | None = None,
        start: int = 0,
    ) -> Iterator[list[Prediction] | VeilheadError]:
        """The answers to texts that need not fit into memory, in their order, as they come.

        A chunk of texts is embedded while earlier ones are on the wire. The iterable is read in the
        caller's thread, no further ahead than the chunks under way. What it raises ends the stream
        at once.

        Args:
            texts: any iterable of texts, endless ones too.
            top_k: labels for each text; None for all.
            function_to_apply: as for `classify`.
            concurrency: chunks of texts under way at once; with those whose answers are there but
                not yet taken, at most twice as many, which bounds the memory. The queries in flight
                are those of the client's own `concurrency`.
            progress: called with the number of rows whenever some are answered; the `update` of a
                tqdm bar fits.
            start: the number of the first row, in the messages of errors.

        Yields:
            For each text its predictions, or, where it failed, the error, whose message names the
            row. When the service cannot be reached or refuses, every later row is a `NotSentError`.

        Raises:
            NoBackboneError: when the model takes embeddings only.
            BackboneError: when the backbone cannot be loaded.
            InputError: when `texts` is a single string.
        """
        stream = self._client._stream(texts, top_k, function_to_apply, concurrency, start)
        return self._streamed(stream, texts, progress)

    def _streamed(
        self, stream: Stream, texts: Iterable[Any], progress: Callable[[int], Any] | None
    ) -> Iterator[Answer]:
        source = iter(texts)
        try:
            while chunk := list(islice(source, stream.chunk)):
                yield from reported(self._run(stream.send, chunk), progress)
            while rest := self._run(stream.rest):
                yield from reported(rest, progress)
        finally:
            if self._process == process_mark():  # the event loop is here
                with suppress(RuntimeError):  # closed already, or collected on the loop's thread
                    self._portal.call(stream.cancel)

    @overload
    def classify_tokens(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too
        self,
        texts: str,
        *,
        aggregation_strategy: AggregationStrategy = "none",
        ignore_labels: Sequence[str] = ("O",),
        stride: int | None = None,
    ) -> list[Entity]: ...

    @overload
    def classify_tokens(
        self,
        texts: Sequence[str],
        *,
        aggregation_strategy: AggregationStrategy = "none",
        ignore_labels: Sequence[str] = ("O",),
        stride: int | None = None,
    ) -> list[list[Entity]]: ...

    def classify_tokens(
        self,
        texts: str | Sequence[str],
        *,
        aggregation_strategy: AggregationStrategy = "none",
        ignore_labels: Sequence[str] = ("O",),
        stride: int | None = None,
    ) -> list[Entity] | list[list[Entity]]:
        """The entities of a text, or of each text of a list, by a model that classifies tokens.

        The tokens of a text are encrypted and sent together: the service sees how many there are.

        Args:
            texts: one text, or a sequence of any length.
            aggregation_strategy: `none` gives every token with its label. The others take
                neighbours with one label together, `B-` beginning and `I-` going on with them:
                `simple` token by token; `first`, `average` and `max` word by word, whose label is
                that of its first token, of their average, or of the surest.
            ignore_labels: labels that are left out.
            stride: None cuts a text at the backbone's `max_tokens`. With a number, and a strategy
                other than `none`, a longer text is classified in windows that overlap by so many
                tokens.

        Returns:
            A list of entities for one text, a list of such lists for a sequence. An entity is what
            the transformers pipeline gives: a dictionary with `entity` and `index`, or with
            `entity_group`, and with `score`, `word`, `start` and `end`.

        Raises:
            InputError: when the model classifies whole texts.
            BackboneError: when the backbone cannot be loaded.
            BatchError: when rows of a sequence failed; it holds the answers of the others.
            VeilheadError: what went wrong with a single text.
        """
        return self._run(
            self._client.classify_tokens,
            texts,
            aggregation_strategy=aggregation_strategy,
            ignore_labels=ignore_labels,
            stride=stride,
        )

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The best label of each text, for evaluation code.

        Raises:
            BatchError: when rows failed; it holds the predictions of the others.
        """
        return self._run(self._client.predict, texts)

    def predict_proba(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Scores of every label for each text, for evaluation code.

        Returns:
            float64 [len(texts), C] in the order of `labels`: probabilities that add up to 1, or one
            for each label by itself when the model's labels do not exclude each other.

        Raises:
            InputError: when the model predicts numbers.
            BatchError: when rows failed; it holds the logits of the others.
        """
        return self._run(self._client.predict_proba, texts)

    def classify_frame(
        self,
        texts: pd.Series,
        *,
        top_k: int = 1,
        function_to_apply: FunctionToApply | None = None,
    ) -> pd.DataFrame:
        """The best labels of a pandas Series of texts, as a DataFrame with the same index.

        Needs pandas: `pip install 'veilhead[tables]'`.

        Args:
            texts: the texts; missing values become errors of their rows.
            top_k: labels for each text.
            function_to_apply: as for `classify`.

        Returns:
            Columns `label` and `score`, then `label_2`, `score_2` and so on up to `top_k`, and
            `error`: why a row failed, and missing where it did not. No row makes the others fail.

        Raises:
            NoBackboneError: when the model takes embeddings only.
            BackboneError: when the backbone cannot be loaded.
        """
        return self._run(
            self._client.classify_frame, texts, top_k=top_k, function_to_apply=function_to_apply
        )

    def logits(self, embeddings: ArrayLike) -> NDArray[np.float64]:
        """Logits of embeddings that were made elsewhere.

        Args:
            embeddings: real numbers [batch, d], in the scale of the model that made them.

        Returns:
            float64 [batch, C], multiples of the step of the head (`HeadScales.logit_step`).

        Raises:
            InputError: when the shape is wrong.
            BatchError: when rows failed (not finite, for instance); it holds the others' logits.
        """
        return self._run(self._client.logits, embeddings)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Embeddings [len(texts), d] of texts, by the public backbone, on this machine.

        Raises:
            NoBackboneError: when the model takes embeddings only.
            BackboneError: when the backbone cannot be loaded.
            DeidentifyError: when a detector failed.
        """
        return self._run(self._client.embed, texts)

    def card(self) -> str:
        """The model card of the pinned version, in Markdown, as the service gives it out.

        With `vendor_key` it is the vendor's own, of this very version, or refused. Without, it is
        whatever the service says.

        Raises:
            SignatureError: when no accepted vendor key signed it.
            ReplyError: when it is not text, or too long.
        """
        return self._run(self._client.card)

    @property
    def _engine(self) -> Engine:
        return self._client._engine

    def _run(
        self, work: Callable[..., Coroutine[Any, Any, _Value]], *arguments: Any, **options: Any
    ) -> _Value:
        """What `work` returns on the event loop. An interrupt here stops it there."""
        self._client._check_process()
        if not self._finalizer.alive:
            raise ClientError("the client is closed: make another one")
        # The portal's own calls wait twice: for the work to begin, and for its value.
        future = asyncio.run_coroutine_threadsafe(work(*arguments, **options), self._loop)
        try:
            return future.result()
        except CancelledError:
            raise ClientError("the client was closed while a call was under way") from None
        finally:
            future.cancel()


def _close(stack: ExitStack, process: int) -> None:
    """Close what a client holds. In a copied process it is left alone: another one uses it."""
    if process == process_mark():
        stack.close()
    else:
        keep_for_ever(stack)


async def _running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()
