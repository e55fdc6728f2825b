"""Errors <-> HTTP: the one place that says which error becomes which status.

Every answer that is not a success is an RFC 9457 problem (`application/problem+json`) with a
stable `type`, the `request_id`, and whether the same request can succeed later (`retryable`).
Details name what was wrong and what was expected, and never hold a byte of a request.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from veilhead_protocol.errors import (
    ModelMismatchError,
    ModelRetiredError,
    StateError,
    StoreError,
    VeilheadError,
    WireError,
    WorkerError,
)

PROBLEM_TYPE: Final = "urn:veilhead:problem:"
MEDIA_TYPE: Final = "application/problem+json"

#: What the OpenAPI document says of every answer that no route declares.
OPENAPI_RESPONSE: Final[dict[str, Any]] = {
    "description": "a problem of RFC 9457; docs/http-api.md lists the codes",
    "content": {
        MEDIA_TYPE: {
            "schema": {
                "type": "object",
                "required": ["type", "title", "status", "detail", "request_id", "retryable"],
                "properties": {
                    "type": {"type": "string", "pattern": f"^{PROBLEM_TYPE}[a-z0-9-]+$"},
                    "title": {"type": "string"},
                    "status": {"type": "integer"},
                    "detail": {"type": "string"},
                    "request_id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
                    "retryable": {"type": "boolean"},
                },
            }
        }
    },
}

#: Seconds after which a client should try again when no worker was free.
RETRY_AFTER_SECONDS: Final = 1

#: Between two log lines of the same error; and how many errors are remembered for that.
_TELL_SECONDS: Final = 60.0
_MOST_TOLD: Final = 256

_told: dict[str, float] = {}

logger = logging.getLogger("veilhead.service")


class Problem(Exception):  # noqa: N818  (the term of RFC 9457)
    """An answer that is not a success, raised by a route."""

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        detail: str,
        *,
        retryable: bool = False,
        headers: dict[str, str] | None = None,
        tenant: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.retryable = retryable
        self.headers = headers or {}
        self.tenant = tenant  # who was refused, where no route is told of it


def model_not_found() -> Problem:
    """No model of this name, or no such version of it, is published."""
    return Problem(
        HTTPStatus.NOT_FOUND,
        "model-not-found",
        "no such model, or no such version of it, is published here; GET /v1/models lists those "
        "that are",
    )


def not_found() -> Problem:
    """The path is none of the routes."""
    status = HTTPStatus.NOT_FOUND
    return Problem(status, "not-found", status.description)


def key_not_registered() -> Problem:
    """The key is unknown, expired or was dropped to make room."""
    return Problem(
        HTTPStatus.NOT_FOUND,
        "key-not-registered",
        "no such key is registered; PUT the key message to /v1/keys/{id} and send the same "
        "query again",
    )


def range_refused(status: HTTPStatus, content_range: str | None) -> Problem:
    """A Range header that is malformed (400), or beyond the end of the file (416)."""
    if status != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return Problem(status, "malformed-range", "expected Range: bytes=FIRST-LAST")
    return Problem(
        status,
        "range-not-satisfiable",
        "the range begins beyond the end of the file",
        headers={} if content_range is None else {"Content-Range": content_range},
    )


def access_log_unavailable() -> Problem:
    """The request cannot be recorded, and the operator wants no request unrecorded."""
    return Problem(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "access-log-unavailable",
        "the service cannot record requests now; send the same request again later",
        retryable=True,
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


def of_error(error: VeilheadError) -> Problem:
    """The problem that an error of ours becomes."""
    if isinstance(error, ModelMismatchError):
        return Problem(HTTPStatus.CONFLICT, error.code, str(error))
    if isinstance(error, WireError):
        return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, error.code, str(error))
    if isinstance(error, WorkerError):
        return Problem(
            HTTPStatus.SERVICE_UNAVAILABLE,
            error.code,
            str(error),
            retryable=True,
            headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
        )
    if isinstance(error, ModelRetiredError):
        return Problem(HTTPStatus.GONE, "model-retired", str(error))
    if isinstance(error, StoreError):
        _tell_operator(f"a model cannot be served: {error}")
        return Problem(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "model-unavailable",
            "what is published here cannot be read or served; the service's log says why",
            retryable=True,
            headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
        )
    if isinstance(error, StateError):  # `tenant_access.py` logs it, once
        return Problem(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "state-unavailable",
            "tenants and budgets cannot be looked up; send the same request again later",
            retryable=True,
            headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
        )
    return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "the service failed")


def _tell_operator(message: str) -> None:
    """Log an error, but the same one at most once a minute: those who ask must not fill the log."""
    now = time.monotonic()
    if now - _told.get(message, -math.inf) < _TELL_SECONDS:
        return
    if len(_told) >= _MOST_TOLD:
        _told.clear()
    _told[message] = now
    logger.error("%s", message)


def _document(problem: Problem, request_id: str) -> dict[str, Any]:
    return {
        "type": PROBLEM_TYPE + problem.code,
        "title": problem.status.phrase,
        "status": int(problem.status),
        "detail": problem.detail,
        "request_id": request_id,
        "retryable": problem.retryable,
    }


def respond(request: Request, problem: Problem) -> JSONResponse:
    """The HTTP response of a problem."""
    request.state.problem = problem.code
    if problem.tenant is not None:
        request.state.tenant = problem.tenant
    body = _document(problem, request.state.request_id)
    return JSONResponse(body, problem.status, problem.headers, media_type=MEDIA_TYPE)


def malformed_request() -> bytes:
    """The whole answer to what is no HTTP request, and reaches no application; it is the last."""
    status, request_id = HTTPStatus.BAD_REQUEST, secrets.token_hex(16)
    detail = "expected a request of HTTP/1 that names one Host and can be read in one way"
    document = _document(Problem(status, "malformed-request", detail), request_id)
    body = json.dumps(document, separators=(",", ":")).encode()
    head = (
        f"HTTP/1.1 {status:d} {status.phrase}\r\n"
        f"content-type: {MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\n"
        f"x-request-id: {request_id}\r\nconnection: close\r\n\r\n"
    )
    return head.encode("ascii") + body


def install(app: FastAPI) -> None:
    """Turn every expected exception of the app into a problem."""

    @app.exception_handler(Problem)
    async def on_problem(request: Request, problem: Problem) -> JSONResponse:
        return respond(request, problem)

    @app.exception_handler(VeilheadError)
    async def on_error(request: Request, error: VeilheadError) -> JSONResponse:
        return respond(request, of_error(error))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        status = HTTPStatus(error.status_code)
        code = status.phrase.lower().replace(" ", "-")
        problem = Problem(status, code, status.description, headers=dict(error.headers or {}))
        return respond(request, problem)

    @app.exception_handler(RequestValidationError)
    async def on_validation(request: Request, error: RequestValidationError) -> JSONResponse:
        where = ", ".join(sorted({str(item["loc"][-1]) for item in error.errors()}))
        detail = f"not valid: {where}"
        return respond(request, Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-request", detail))


def of_failure(request_id: str, error: Exception) -> Problem:
    """The problem that an exception of nobody's making becomes; the log gets only its kind.

    A message or a traceback's local variable may hold bytes of the request.
    """
    logger.error("request %s failed: %s", request_id, type(error).__name__)
    return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "the service failed")
