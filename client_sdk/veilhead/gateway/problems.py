"""Errors -> the answers that callers of text-embeddings-inference know.

`{"error": ..., "error_type": ...}`, with its types. Its statuses too where they fit; what the
vendor's service did is 502 and 503 here, as of any gateway, and what a caller wrote is 422.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

from fastapi.responses import JSONResponse

from veilhead_protocol.errors import (
    BudgetExhaustedError,
    CallerError,
    DeidentifyError,
    GatewayClosedError,
    GatewayFullError,
    GatewayTimeoutError,
    InputError,
    NotSentError,
    ReplyError,
    RequestSizeError,
    ServiceResponseError,
    TransportError,
    VeilheadError,
)
from veilhead_protocol.redaction import redacted

_RETRY_SECONDS: Final = 1


def respond(error: VeilheadError) -> JSONResponse:
    """The answer that an error becomes: no text, and what others said is redacted."""
    status, kind = _meaning(error)
    headers = {}
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        asked = error.retry_after if isinstance(error, ServiceResponseError) else None
        headers["Retry-After"] = str(max(asked or 0, _RETRY_SECONDS))
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(
        {"error": redacted(error), "error_type": kind}, status_code=status, headers=headers
    )


def _meaning(error: VeilheadError) -> tuple[HTTPStatus, str]:
    match error:
        case CallerError():
            return HTTPStatus.UNAUTHORIZED, "Unauthorized"
        case RequestSizeError():
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "Validation"
        case InputError() | DeidentifyError():
            return HTTPStatus.UNPROCESSABLE_ENTITY, "Validation"
        case GatewayFullError() | BudgetExhaustedError():
            return HTTPStatus.TOO_MANY_REQUESTS, "Overloaded"
        case GatewayClosedError():
            return HTTPStatus.SERVICE_UNAVAILABLE, "Unhealthy"
        case GatewayTimeoutError():
            return HTTPStatus.GATEWAY_TIMEOUT, "Backend"
        case ServiceResponseError(retryable=True):
            return HTTPStatus.SERVICE_UNAVAILABLE, "Unhealthy"
        case TransportError() | ServiceResponseError() | ReplyError() | NotSentError():
            return HTTPStatus.BAD_GATEWAY, "Backend"
        case _:
            return HTTPStatus.INTERNAL_SERVER_ERROR, "Backend"
