"""What the service notes about a request: counts, times, sizes, names. Never a payload.

One middleware watches every request from outside and hands what it saw to the metrics, the traces
and the access log.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from fastapi import Request
from starlette.datastructures import Headers
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veilhead_protocol.errors import AccessLogError
from veilhead_service import problems
from veilhead_service.access_log import AccessLog, shortened
from veilhead_service.logs import request_state
from veilhead_service.strangers import Strangers
from veilhead_service.telemetry import Telemetry
from veilhead_service.tracing import Tracing

#: Stands for a route, model or tenant that a request named and that does not exist.
OTHER: Final = "other"
#: Stands for a model or tenant where there is none.
NONE: Final = "none"

_METHODS: Final = frozenset({"GET", "HEAD", "PUT", "POST", "DELETE", "PATCH", "OPTIONS"})

#: Asked for by machines every few seconds; they name no tenant and no model.
_UNRECORDED: Final = frozenset({"/livez", "/readyz", "/metrics"})


@dataclass(frozen=True)
class Observation:
    """One answered request.

    No field holds anything that a client chose freely: `route` is the template of a route, names
    are those of published models and configured tenants, and everything else is `other` or `none`.

    Attributes:
        request_id: the service's own random id.
        method: a known HTTP method, or `other`.
        route: the route's template, or `other`.
        tenant: the tenant's name, or `none`.
        model: the published model's name, `other` when the request named none of them, `none`
            when the route has no model.
        model_digest: SHA-256 of the manifest, or None.
        key_id: SHA-256 of the key message, or None.
        status: HTTP status.
        problem: the problem's code, or None.
        request_bytes: bytes of the body that were read.
        reply_bytes: bytes of the answer's body.
        seconds: from the first byte of the request to the last of the answer.
        receive_seconds: of these, until the body was read.
        queue_seconds: of these, waiting for a worker; None where nothing was evaluated.
        evaluate_seconds: of these, in the worker; None where nothing was evaluated.
    """

    request_id: str
    method: str
    route: str
    tenant: str
    model: str
    model_digest: bytes | None
    key_id: bytes | None
    status: int
    problem: str | None
    request_bytes: int
    reply_bytes: int
    seconds: float
    receive_seconds: float
    queue_seconds: float | None
    evaluate_seconds: float | None


class _Watch:
    """What is seen of one request while it goes by."""

    def __init__(self, scope: Scope, route_of: Callable[[str], str]) -> None:
        self._scope = scope
        self._route_of = route_of
        self._state: MutableMapping[str, Any] = scope.setdefault("state", {})
        self._started = time.perf_counter()
        self._received: float | None = None
        self._request_bytes = 0
        self.status = int(HTTPStatus.INTERNAL_SERVER_ERROR)
        self.reply_bytes = 0

    @property
    def state(self) -> MutableMapping[str, Any]:
        """The request's state, which routes write to."""
        return self._state

    def received(self, message: Message) -> None:
        if message["type"] == "http.request":
            self._request_bytes += len(message.get("body", b""))
            if not message.get("more_body", False):
                self._received = time.perf_counter()

    def observation(self) -> Observation:
        state = self._state
        # A request that was refused before the router saw it has none yet.
        route = getattr(self._scope.get("route"), "path", None) or self._route_of(
            self._scope["path"]
        )
        method = self._scope["method"]
        named = OTHER if "{name}" in route else NONE
        received = self._started if self._received is None else self._received
        return Observation(
            request_id=state.get("request_id", ""),
            method=method if method in _METHODS else OTHER,
            route=route,
            tenant=state.get("tenant") or NONE,
            model=state.get("model") or named,
            model_digest=state.get("model_digest"),
            key_id=state.get("key_id"),
            status=self.status,
            problem=state.get("problem"),
            request_bytes=self._request_bytes,
            reply_bytes=self.reply_bytes,
            seconds=time.perf_counter() - self._started,
            receive_seconds=received - self._started,
            queue_seconds=state.get("queue_seconds"),
            evaluate_seconds=state.get("evaluate_seconds"),
        )


class ObservationMiddleware:
    """Watches requests from outside of everything else but the server."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        telemetry: Telemetry,
        strangers: Strangers,
        tracing: Tracing | None = None,
        access_log: AccessLog | None = None,
        log_required: bool = False,
        templates: Sequence[str] = (),
    ) -> None:
        """Watch `app`.

        Args:
            app: what answers.
            telemetry: counts every request.
            strangers: counts those that were refused without a good API key.
            tracing: makes spans of every request, when there is one.
            access_log: records tenants' requests, when there is one.
            log_required: answer 503 to what cannot be recorded.
            templates: the app's routes, for requests that are refused before they reach one.
        """
        self._app = app
        self._telemetry = telemetry
        self._strangers = strangers
        self._tracing = tracing
        self._access_log = access_log
        self._log_required = log_required
        self._templates = [(compile_path(template)[0], template) for template in templates]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request and note what it was."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        watch = _Watch(scope, self._route_of)
        log = None if scope["path"] in _UNRECORDED else self._access_log
        answer = _Answer(watch, send, log, required=self._log_required)

        async def receive_watched() -> Message:
            message = await receive()
            watch.received(message)
            return message

        token = request_state.set(watch.state)
        try:
            with self._telemetry.in_flight.track_inprogress():
                if log is not None and self._log_required and not log.available:
                    watch.state.setdefault("request_id", secrets.token_hex(16))
                    await answer.refuse(scope, receive)
                else:
                    await self._app(scope, receive_watched, answer.send)
        finally:
            observation = watch.observation()
            self._telemetry.observe(observation)
            if observation.tenant == NONE and observation.problem is not None:
                self._strangers.note(observation.problem)
            if self._tracing is not None:
                self._tracing.record(observation)
            request_state.reset(token)

    def _route_of(self, path: str) -> str:
        for pattern, template in self._templates:
            if pattern.fullmatch(path):
                return template
        return OTHER


class _Answer:
    """An answer on its way out; it waits for its record where that is required."""

    def __init__(self, watch: _Watch, send: Send, log: AccessLog | None, *, required: bool) -> None:
        self._watch = watch
        self._send = send
        self._log = log
        self._required = required
        self._refused = False

    async def send(self, message: Message) -> None:
        """Pass a message on, once the request is recorded."""
        if self._refused:
            return
        if message["type"] == "http.response.start":
            self._watch.status = message["status"]
            declared = Headers(raw=message["headers"]).get("content-length", "0")
            try:
                await self._record(int(declared))
            except AccessLogError:
                self._refused = True
                await self.refuse(self._watch._scope, _no_body)
                return
        elif message["type"] == "http.response.body":
            self._watch.reply_bytes += len(message.get("body", b""))
        await self._send(message)

    async def refuse(self, scope: Scope, receive: Receive) -> None:
        """Answer that the request cannot be recorded, which itself goes unrecorded."""
        problem = problems.access_log_unavailable()
        response = problems.respond(Request(scope), problem)
        response.headers["X-Request-Id"] = self._watch.state["request_id"]
        self._watch.status = response.status_code
        self._watch.reply_bytes = len(response.body)
        await response(scope, receive, self._send)

    async def _record(self, reply_bytes: int) -> None:
        """Append the request's record; wait for it where that is required.

        Raises:
            AccessLogError: when it is required and cannot be written.
        """
        if self._log is None:
            return
        seen = self._watch.observation()
        if seen.tenant == NONE:  # the log would grow as fast as anybody likes
            return
        written = self._log.append(
            request_id=seen.request_id,
            tenant=seen.tenant,
            method=seen.method,
            route=seen.route,
            key=None if seen.key_id is None else shortened(seen.key_id),
            model=seen.model,
            model_digest=None if seen.model_digest is None else seen.model_digest.hex(),
            request_bytes=seen.request_bytes,
            reply_bytes=reply_bytes,
            status=seen.status,
            problem=seen.problem,
        )
        if self._required:
            await asyncio.wrap_future(written)


async def _no_body() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}
