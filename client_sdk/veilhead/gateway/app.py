"""The gateway's application: plaintext in, plaintext out, on a network that may see it."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from veilhead.async_client import AsyncClient
from veilhead.gateway.batching import BATCHES_IN_FLIGHT, Batcher, Outcome
from veilhead.gateway.callers import Callers
from veilhead.gateway.metrics import Metrics
from veilhead.gateway.problems import respond
from veilhead.gateway.upstream import Upstream
from veilhead.predictions import FunctionToApply, default_function, scores
from veilhead_protocol.errors import (
    CallerError,
    ClientError,
    GatewayTimeoutError,
    InputError,
    NotSentError,
    RequestSizeError,
    ServiceResponseError,
    TransportError,
    VeilheadError,
)

_logger = logging.getLogger("veilhead.gateway")

#: A caller that sends its body more slowly is cut off.
_BODY_SECONDS: Final = 30.0

_PAIR: Final = (
    "pairs of texts are not supported: expected a string, a list of strings, or a list of lists "
    "with one string each"
)


@dataclass(frozen=True)
class Limits:
    """What callers may ask, and how their texts are put together.

    Attributes:
        max_batch: texts that are embedded together.
        max_wait_seconds: how long a text waits for others to join it.
        max_waiting: texts of one caller that may wait; more are refused with 429.
        max_texts: texts of one request.
        max_body_bytes: bytes of one request.
        max_connections: connections at once; more are closed unanswered.
        request_seconds: a request that takes longer in all is given up.
    """

    max_batch: int = 32
    max_wait_seconds: float = 0.005
    max_waiting: int = 2048
    max_texts: int = 256
    max_body_bytes: int = 2 * 2**20
    max_connections: int = 256
    request_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in (
            "max_batch",
            "max_waiting",
            "max_texts",
            "max_body_bytes",
            "max_connections",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.max_wait_seconds <= 10:
            raise InputError(
                f"max_wait_seconds must be between 0 and 10, got {self.max_wait_seconds}"
            )
        if not 0 < self.request_seconds <= 3600:
            raise InputError(
                f"request_seconds must be above 0 and at most 3600, got {self.request_seconds}"
            )


class Gateway:
    """What the routes share."""

    def __init__(
        self, client: AsyncClient, callers: Callers | None, limits: Limits, metrics: Metrics
    ) -> None:
        self.client = client
        self.callers = callers
        self.limits = limits
        self.metrics = metrics
        self.draining = False
        self.upstream = Upstream(client._probe)
        self._batchers: list[Batcher] = []  # one for each caller
        self._work: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Connected, with the backbone loaded, making batches."""
        async with self.client:
            # Nothing is sent: it fetches and loads the backbone before the first caller waits.
            await self.client.embed([""])
            slots = asyncio.Semaphore(BATCHES_IN_FLIGHT)
            self._batchers = [
                Batcher(
                    self._logits,
                    max_batch=self.limits.max_batch,
                    max_wait_seconds=self.limits.max_wait_seconds,
                    max_waiting=self.limits.max_waiting,
                    on_batch=self.metrics.batched,
                    slots=slots,
                )
                for _ in range(1 if self.callers is None else len(self.callers))
            ]
            self.metrics.waiting.set_function(
                lambda: float(sum(batcher.waiting for batcher in self._batchers))
            )
            self._work = [asyncio.create_task(batcher.run()) for batcher in self._batchers]
            watching = asyncio.create_task(self.upstream.watch())
            try:
                yield
            finally:
                watching.cancel()
                self.stop()
                await asyncio.gather(*self._work, watching, return_exceptions=True)

    def stop(self) -> None:
        """Take no new texts; batches on their way are answered."""
        self.draining = True
        for work in self._work:
            work.cancel()

    def batcher(self, authorization: str) -> Batcher:
        """What makes batches of the caller that an Authorization header names.

        Raises:
            CallerError: when it names none.
            ClientError: when the gateway does not run.
        """
        caller = 0 if self.callers is None else self.callers.find(authorization)
        if caller is None:
            raise CallerError("expected `Authorization: Bearer` with the token of a caller")
        if not self._batchers:
            raise ClientError("the gateway does not run: its lifespan has not begun")
        return self._batchers[caller]

    async def _logits(self, texts: list[str]) -> Sequence[Outcome]:
        """Logits [C] in the order of the labels, or an error, for each text."""
        try:
            # Nobody waits for a batch longer, and a service that hangs must not keep its place.
            async with self._deadline():
                # No labels are made here: the next batch must not wait for what takes its time by
                # the values of this one.
                rows = await self.client._logits_of(texts)
        except VeilheadError as error:
            return [error] * len(texts)
        return [_cause(row, rows) if isinstance(row, VeilheadError) else row for row in rows]

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        seconds = self.limits.request_seconds
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise GatewayTimeoutError(
                f"no answer within {seconds:g} seconds; the vendor's service may be slow or gone"
            ) from None

    async def predict(self, request: Request) -> JSONResponse:
        """The answer to POST /predict.

        Raises:
            VeilheadError: one of those that `respond` knows.
        """
        async with self._deadline():
            return await self._predict(request)

    async def _predict(self, request: Request) -> JSONResponse:
        batcher = self.batcher(request.headers.get("authorization", ""))
        # Browsers let any page post other types to loopback.
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise InputError("expected the content type application/json")
        asked = _Asked.parse(await _body(request, self.limits.max_body_bytes))
        if len(asked.texts) > self.limits.max_texts:
            raise RequestSizeError(
                f"got {len(asked.texts)} texts, expected at most {self.limits.max_texts}"
            )
        outcomes = await batcher.ask(asked.texts)
        function = "none" if asked.raw_scores else default_function(self.client.manifest.head)
        rows = []
        for outcome in outcomes:
            if isinstance(outcome, VeilheadError):
                raise outcome
            # On a thread: it takes longer for some logits than for others, and the service chooses
            # them. No batch waits for it.
            rows.append(await asyncio.to_thread(_shaped, outcome, self.client.labels, function))
        return JSONResponse(rows[0] if asked.is_single else rows)


def _cause(error: VeilheadError, rows: Sequence[Outcome]) -> VeilheadError:
    """Why a row failed: for one that was not sent, what showed that none can succeed."""
    if isinstance(error, NotSentError):
        for other in rows:
            if isinstance(other, TransportError | ServiceResponseError):
                return other
    return error


@dataclass(frozen=True, repr=False)
class _Asked:
    """A request's body."""

    texts: list[str]
    is_single: bool
    raw_scores: bool

    @classmethod
    def parse(cls, body: bytes) -> _Asked:
        """Raises InputError, which never quotes the body."""
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            raise InputError("the body is not JSON") from None
        if not isinstance(document, dict) or "inputs" not in document:
            raise InputError('expected a JSON object with "inputs"')
        if document.get("truncation_direction", "right") not in ("right", "Right"):
            raise InputError("texts are cut at their end: truncation_direction can be right only")
        for name in ("raw_scores", "truncate"):
            if not isinstance(document.get(name, False), bool | None):
                raise InputError(f"{name} must be true or false")
        inputs = document["inputs"]
        return cls(
            texts=[inputs] if isinstance(inputs, str) else [_text(item) for item in _list(inputs)],
            is_single=isinstance(inputs, str),
            raw_scores=bool(document.get("raw_scores")),
        )


def _list(inputs: Any) -> list[Any]:
    if not isinstance(inputs, list):
        raise InputError("inputs must be a string or a list")
    if not inputs:
        raise InputError("inputs must not be empty")
    return inputs


def _text(item: Any) -> str:
    if isinstance(item, list):
        if len(item) == 2 and all(isinstance(part, str) for part in item):
            raise InputError(_PAIR)
        item = item[0] if len(item) == 1 else None
    if not isinstance(item, str):
        raise InputError("every input must be a string, or a list of one string")
    return item


async def _body(request: Request, limit: int) -> bytes:
    """The body, of at most `limit` bytes."""
    pieces, size = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size > limit:
                    raise RequestSizeError(f"the body is longer than {limit} bytes")
                pieces.append(piece)
    except TimeoutError:
        raise InputError(f"the body did not come within {_BODY_SECONDS:.0f} seconds") from None
    except ClientDisconnect:
        raise InputError("the caller has gone") from None
    return b"".join(pieces)


def _shaped(
    logits: NDArray[np.float64],
    labels: Sequence[str],
    function: FunctionToApply,
) -> list[dict[str, Any]]:
    """All labels with their scores, best first."""
    values = scores(logits, function)
    order = np.argsort(-logits, kind="stable")
    return [{"score": float(values[place]), "label": labels[place]} for place in order]


def create_app(gateway: Gateway) -> FastAPI:
    """The routes of a gateway, which answer while it is `running`."""
    app = FastAPI(
        title="Veilhead gateway",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        # FastAPI's own logs and spans could hold what callers sent.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        started = time.monotonic()
        try:
            response: Response = await gateway.predict(request)
        except VeilheadError as error:
            _logger.log(_level(error), "a request failed: %s", error.code)
            response = respond(error)
        except Exception as error:
            # Never its message: what code of others says may hold text.
            _logger.error("a request failed with %s", type(error).__name__)
            response = respond(VeilheadError("the gateway failed"))
        gateway.metrics.answered(response.status_code, time.monotonic() - started)
        return response

    @app.get("/health")
    async def health() -> Response:
        ready = gateway.upstream.ready and not gateway.draining
        document = {"draining": gateway.draining, "upstream": gateway.upstream.described()}
        return JSONResponse(document, status_code=200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(gateway.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return app


def _level(error: VeilheadError) -> int:
    """Callers' mistakes are theirs; what the vendor's service did concerns the operator."""
    return logging.DEBUG if isinstance(error, InputError) else logging.WARNING
