"""The HTTP routes. docs/http-api.md is the specification."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from veilhead_models.artifact import BACKBONE_DIRECTORY
from veilhead_protocol.errors import (
    MessageLengthError,
    ModelMismatchError,
    ModelRetiredError,
    ModelUnavailableError,
    StoreError,
)
from veilhead_protocol.layout import Layout
from veilhead_protocol.manifest import FORMAT as MANIFEST_FORMAT
from veilhead_protocol.signatures import SIGNATURE_HEADER, write_signatures
from veilhead_protocol.wire import (
    DIGEST_BYTES,
    FORMAT_VERSION,
    MAX_KEY_BYTES,
    MAX_QUERY_BYTES,
    QUERY_HEADER_BYTES,
    KeyMessage,
    QueryHeader,
    QueryMessage,
    carried_key,
    key_id,
)
from veilhead_service.access import Access
from veilhead_service.card import to_html
from veilhead_service.intake import Intake
from veilhead_service.keys import KeyStore
from veilhead_service.limits import Budget, Usage, charge, policy_budget, requested_layout
from veilhead_service.model_store import ModelSource, StoredModel
from veilhead_service.problems import (
    OPENAPI_RESPONSE,
    Problem,
    key_not_registered,
    model_not_found,
    range_refused,
)
from veilhead_service.strangers import Strangers
from veilhead_service.telemetry import MEDIA_TYPE as METRICS_TYPE
from veilhead_service.telemetry import Telemetry
from veilhead_service.workers import WorkerPool

MESSAGE_TYPE: Final = "application/octet-stream"
# Not `public`: a shared cache would then answer those who have no API key.
_CACHE_FOREVER: Final = "private, max-age=31536000, immutable"
_REVALIDATE: Final = "no-cache"

router = APIRouter(responses={"default": OPENAPI_RESPONSE})

logger = logging.getLogger("veilhead.service")


@dataclass(frozen=True)
class Services:
    """What the routes work with, injected by the app."""

    models: ModelSource
    keys: KeyStore
    pool: WorkerPool
    intake: Intake
    access: Access
    telemetry: Telemetry
    strangers: Strangers


# Coroutines, though they wait for nothing: plain functions would be called on a thread each.
async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


_Services = Annotated[Services, Depends(_services)]


async def _tenant(request: Request) -> str:
    tenant: str = request.state.tenant  # set by the access gate, before any route
    return tenant


_Tenant = Annotated[str, Depends(_tenant)]


def _digest(text: str) -> bytes:
    """A SHA-256 digest of 64 lower-case hexadecimal digits."""
    if len(text) != 2 * DIGEST_BYTES or set(text) - set("0123456789abcdef"):
        raise Problem(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "malformed-digest",
            "a digest is written as 64 lower-case hexadecimal digits",
        )
    return bytes.fromhex(text)


async def _body(
    request: Request,
    intake: Intake,
    tenant: str,
    limit: int,
    expect: Callable[[bytes], int] | None = None,
) -> bytes:
    """The body of a message: of the right type, and refused as soon as it passes the limit.

    With `expect`, the header's bytes say (or raise) how long the body has to be exactly, as soon as
    they are here: nothing more of another one is read.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != MESSAGE_TYPE:
        raise Problem(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "unsupported-media-type",
            f"expected Content-Type {MESSAGE_TYPE}",
        )
    too_large = Problem(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "body-too-large",
        f"a message has at most {limit} bytes",
    )
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
        raise too_large
    body = bytearray()
    expected: int | None = None
    async with intake.body(tenant):
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise too_large
            if expect is not None and expected is None and len(body) >= QUERY_HEADER_BYTES:
                expected = expect(bytes(body[:QUERY_HEADER_BYTES]))
            if expected is not None and len(body) > expected:
                break
    if expect is not None and expected is None:
        expected = expect(bytes(body))  # shorter than a header: raises
    if expected is not None and len(body) != expected:
        raise MessageLengthError(
            f"got {'more than' if len(body) > expected else 'only'} "
            f"{min(len(body), expected)} bytes, expected {expected} for this model and layout"
        )
    return bytes(body)


def _message_in(description: str) -> dict[str, Any]:
    """The OpenAPI text of a route that takes a message."""
    schema = {"type": "string", "format": "binary"}
    content = {MESSAGE_TYPE: {"schema": schema}}
    return {"requestBody": {"required": True, "description": description, "content": content}}


def _quoted(digest: str) -> str:
    return f'"{digest}"'


def _matches(if_none_match: str | None, etag: str) -> bool:
    tags = {tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")}
    return etag in tags or "*" in tags


async def infer(name: str, request: Request, services: _Services, tenant: _Tenant) -> Response:
    """Evaluate the head on encrypted embeddings and answer with a reply message."""
    found: list[tuple[QueryHeader, StoredModel, Layout]] = []

    def expect(data: bytes) -> int:
        header = QueryHeader.deserialize(data)
        model = services.models.version(name, header.model_digest)
        if model is None:
            raise ModelMismatchError(
                "the query names a version of this model that is not published here; "
                "read the manifest again and make a new query"
            )
        layout = requested_layout(header, model.manifest)
        services.pool.check(model)
        if header.has_key:
            services.access.count_registration(tenant)
        found.append((header, model, layout))
        parameters = model.manifest.parameter_set
        return QueryMessage.size(parameters, layout, has_key=header.has_key)

    try:
        services.pool.admit(
            tenant
        )  # before the body: a query that must wait too long is not even read
        body = await _body(request, services.intake, tenant, MAX_QUERY_BYTES, expect)
    except Exception:
        # Which model it was about, or that there is none: only now, since it costs a look at disk.
        with suppress(ModelRetiredError, ModelUnavailableError):  # another version may be served
            _note_model(request, _current(services, name))
        raise
    ((header, model, layout),) = found
    _note_model(request, model)
    request.state.key_id = header.key_id
    # A key that comes with its query serves this query alone.
    key = carried_key(body, header) or services.keys.get(tenant, header.key_id)
    if not key:
        raise key_not_registered()
    # The key may have been revoked while the body was on its way.
    await services.access.confirm(request.headers.getlist("authorization"), request.scope["path"])
    units = charge(layout)
    async with services.access.charged(tenant, name, units, policy_budget(model.manifest)):
        evaluation = await services.pool.evaluate(
            model, header.key_id, key, body, layout=layout, tenant=tenant
        )
    request.state.queue_seconds = evaluation.queue_seconds
    request.state.evaluate_seconds = evaluation.seconds
    return Response(
        evaluation.reply,
        media_type=MESSAGE_TYPE,
        headers={
            "X-Veilhead-Model": model.manifest.digest.hex(),
            "Server-Timing": f"evaluate;dur={evaluation.seconds * 1e3:.3f}",
            "Cache-Control": "no-store",
        },
    )


class _QueryRoute(APIRoute):
    """The route of queries, which come by the thousand: what it needs is found at once.

    FastAPI's own way of looking for parameters and dependencies takes as long as the rest.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a query; any other method is refused as elsewhere."""
        if scope["method"] != "POST":
            await super().handle(scope, receive, send)
            return
        request = Request(scope, receive, send)
        services, tenant = await _services(request), await _tenant(request)
        response = await infer(request.path_params["name"], request, services, tenant)
        await response(scope, receive, send)


def install(app: FastAPI) -> None:
    """Add every route to an app."""
    # The first one, and outside of the router: routes are tried in order, and routers twice.
    app.router.add_api_route(
        "/v1/models/{name}/infer",
        infer,
        methods=["POST"],
        tags=["inference"],
        response_class=Response,
        responses={"default": OPENAPI_RESPONSE},
        openapi_extra=_message_in("a query message"),
        route_class_override=_QueryRoute,
    )
    app.include_router(router)


@router.get("/v1/models", tags=["models"])
async def list_models(services: _Services) -> dict[str, list[dict[str, str]]]:
    """The published models, by name, each with the digest of its current version."""
    found = []
    for name in services.models.names():
        try:
            model = services.models.current(name)
        except ModelRetiredError:
            continue
        except StoreError as error:  # a damaged model must not hide the others
            logger.error("a model is left out of the list: %s", error)
            continue
        if model is not None:
            found.append({"name": name, "digest": model.manifest.digest.hex()})
    return {"models": found}


def _policy_budgets(services: Services) -> dict[str, Budget | None]:
    """Every model, with the budget of its current version's policy."""
    found: dict[str, Budget | None] = {}
    names: list[str] = []
    with suppress(StoreError):  # budgets in use are shown all the same
        names = services.models.names()
    for name in names:
        model = None
        with suppress(StoreError):  # retired or damaged: what it was asked still counts
            model = services.models.current(name)
        found[name] = None if model is None else policy_budget(model.manifest)
    return found


def _current(services: Services, name: str) -> StoredModel:
    model = services.models.current(name)
    if model is None:
        raise model_not_found()
    return model


def _version(services: Services, name: str, digest: str | None) -> StoredModel:
    if digest is None:
        return _current(services, name)
    model = services.models.version(name, _digest(digest))
    if model is None:
        raise model_not_found()
    return model


def _note_model(request: Request, model: StoredModel) -> None:
    """Tell `observation.py` which published model a request is about."""
    request.state.model = model.manifest.name
    request.state.model_digest = model.manifest.digest


_VersionDigest = Annotated[
    str | None, Query(description="digest of a version; the current one when it is absent")
]


@router.get(
    "/v1/models/{name}",
    tags=["models"],
    response_class=Response,
    responses={304: {"description": "the manifest that the client has"}},
)
async def get_manifest(
    name: str,
    request: Request,
    services: _Services,
    digest: _VersionDigest = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """The manifest's canonical bytes. The ETag is their SHA-256, which clients pin.

    Headers say who signed it, and when it will be retired. They may change while the bytes do not,
    so a cache always asks again, with If-None-Match; a 304 carries them too.
    """
    model = _version(services, name, digest)
    _note_model(request, model)
    etag = _quoted(model.manifest.digest.hex())
    headers = {"ETag": etag, "Cache-Control": _REVALIDATE}
    if model.retirement is not None:
        headers["Sunset"] = model.retirement.http_date
    if model.signatures:
        headers[SIGNATURE_HEADER] = write_signatures(model.signatures)
    if _matches(if_none_match, etag):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(model.manifest_bytes, media_type="application/json", headers=headers)


@router.get(
    "/v1/models/{name}/card",
    tags=["models"],
    response_class=Response,
    responses={
        200: {"content": {"text/markdown": {}, "text/html": {}}, "description": "the model card"},
    },
)
async def get_card(
    name: str,
    request: Request,
    services: _Services,
    digest: _VersionDigest = None,
    accept: Annotated[str | None, Header()] = None,
) -> Response:
    """The model card: what the vendor published, or else what the manifest says.

    HTML where `Accept` names text/html, else Markdown. A header says who signed the Markdown.
    """
    model = _version(services, name, digest)
    _note_model(request, model)
    card = model.card()
    headers = {
        "Cache-Control": _REVALIDATE,
        "Vary": "Accept",
        "X-Veilhead-Model": model.manifest.digest.hex(),
    }
    if "text/html" not in (accept or "").lower():
        if card.signatures:
            headers[SIGNATURE_HEADER] = write_signatures(card.signatures)
        return Response(card.markdown, media_type="text/markdown; charset=utf-8", headers=headers)
    page = to_html(card.markdown, f"Model card: {model.manifest.name}")
    # The card is the vendor's, but nothing in it may run or load anything.
    headers |= {
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(page, media_type="text/html; charset=utf-8", headers=headers)


class _PublicFile(FileResponse):
    """A file, as long as there is a place for it on the way out.

    A range that it cannot answer becomes a problem, as every other refusal.
    """

    def __init__(self, path: Path, place: AbstractContextManager[None], **options: Any) -> None:
        super().__init__(path, **options)
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_unless_refused(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                headers = Headers(raw=message["headers"])
                raise range_refused(HTTPStatus(message["status"]), headers.get("content-range"))
            await send(message)

        with self._place:
            await super().__call__(scope, receive, send_unless_refused)


@router.get(
    "/v1/models/{name}/files/{path:path}",
    tags=["models"],
    response_class=Response,
    responses={
        206: {"description": "a part of the file"},
        304: {"description": "the file that the client has"},
    },
)
async def get_file(
    name: str,
    path: str,
    request: Request,
    services: _Services,
    tenant: _Tenant,
    digest: _VersionDigest = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """A file of the public backbone, as the manifest lists it; ranges are supported."""
    model = _version(services, name, digest)
    _note_model(request, model)
    backbone = model.manifest.backbone
    entries = {} if backbone is None else {entry.path: entry for entry in backbone.all_files}
    entry = entries.get(path)  # only paths of the manifest: nothing of a request names a file
    if entry is None:
        raise Problem(
            HTTPStatus.NOT_FOUND, "file-not-found", "the manifest lists no file of this path"
        )
    etag = _quoted(entry.sha256)
    headers = {"ETag": etag, "Cache-Control": _CACHE_FOREVER if digest else _REVALIDATE}
    if _matches(if_none_match, etag):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return _PublicFile(
        model.directory / BACKBONE_DIRECTORY / entry.path,
        services.intake.downloads.one(tenant),
        media_type=MESSAGE_TYPE,
        headers=headers,
    )


@router.put(
    "/v1/keys/{id}",
    tags=["keys"],
    status_code=HTTPStatus.CREATED,
    responses={200: {"description": "the key was registered before"}},
    openapi_extra=_message_in("a key message"),
)
async def register_key(
    id: str,  # noqa: A002
    request: Request,
    services: _Services,
    tenant: _Tenant,
) -> Response:
    """Register a key message under its SHA-256: 201 when it is new, 200 when it was known."""
    expected = request.state.key_id = _digest(id)
    body = await _body(request, services.intake, tenant, MAX_KEY_BYTES)
    if not hmac.compare_digest(key_id(body), expected):
        raise Problem(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "digest-mismatch",
            "the SHA-256 of the body is not the id in the path",
        )
    KeyMessage.deserialize(body)
    new = services.keys.put(tenant, expected, body)
    return JSONResponse({"id": id}, HTTPStatus.CREATED if new else HTTPStatus.OK)


@router.head("/v1/keys/{id}", tags=["keys"], response_class=Response)
async def has_key(id: str, request: Request, services: _Services, tenant: _Tenant) -> Response:  # noqa: A002
    """200 when the key is registered, 404 when it is not."""
    request.state.key_id = _digest(id)
    if services.keys.get(tenant, request.state.key_id) is None:
        raise key_not_registered()
    return Response()


@router.delete("/v1/keys/{id}", tags=["keys"], status_code=HTTPStatus.NO_CONTENT)
async def forget_key(id: str, request: Request, services: _Services, tenant: _Tenant) -> Response:  # noqa: A002
    """Forget a key: 204, or 404 when it was not registered."""
    request.state.key_id = _digest(id)
    if not services.keys.discard(tenant, request.state.key_id):
        raise key_not_registered()
    return Response(status_code=HTTPStatus.NO_CONTENT)


@router.get("/v1/usage", tags=["usage"])
async def get_usage(services: _Services, tenant: _Tenant) -> dict[str, Any]:
    """The tenant's rate limit, and for each model what is used and left of the budget."""
    rate, found = await services.access.usage(tenant, _policy_budgets(services))
    return {
        "tenant": tenant,
        "rate": None if rate is None else {"per_second": rate.per_second, "burst": rate.burst},
        "models": [_usage_row(usage) for usage in found],
    }


def _usage_row(usage: Usage) -> dict[str, Any]:
    return {
        "model": usage.model,
        "budget": usage.budget.units,
        "used": usage.used,
        "remaining": usage.remaining,
        "period": usage.budget.period.value,
        "period_ends": datetime.fromtimestamp(usage.ends, UTC).isoformat(),
    }


@router.get("/livez", tags=["health"])
async def live() -> dict[str, str]:
    """200 while the process answers."""
    return {"status": "live"}


@router.get(
    "/readyz",
    tags=["health"],
    responses={
        503: {"description": "no query can be evaluated", "content": {"application/json": {}}}
    },
)
async def ready(services: _Services) -> JSONResponse:
    """200 when queries can be evaluated, 503 when not; names the models that cannot be asked."""
    found: dict[str, Any] = {"status": "ready"}
    if not services.pool.ready:
        found = {"status": "not ready"}
    elif not await services.access.ready():
        found = {"status": "not ready", "reason": "state-unavailable"}
    is_ready = found["status"] == "ready"
    # Only the kind of reason: anybody may ask, and reasons name paths.
    if rows := [{"name": row.name, "why": row.why} for row in services.pool.unavailable()]:
        found["unavailable_models"] = rows
    return JSONResponse(found, HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE)


@router.get("/version", tags=["health"])
async def get_version() -> dict[str, str | int]:
    """The service's version and the formats that it speaks."""
    return {
        "service": version("veilhead"),
        "wire_format": FORMAT_VERSION,
        "manifest_format": MANIFEST_FORMAT,
    }


@router.get("/metrics", tags=["health"], response_class=Response)
async def get_metrics(services: _Services) -> Response:
    """Metrics in Prometheus' text format, times in seconds and sizes in bytes."""
    budgets = await services.access.usage_snapshot(_policy_budgets(services))
    return Response(services.telemetry.expose(budgets), headers={"Content-Type": METRICS_TYPE})
