"""The application, made by a factory with everything injected."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request
from starlette.datastructures import MutableHeaders
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veilhead_protocol.copies import process_mark
from veilhead_service import problems, routes, telemetry
from veilhead_service.access import AccessGate, InsecureAccess
from veilhead_service.access_log import AccessLog
from veilhead_service.access_log_chain import FILE_NAME
from veilhead_service.background import reason_of
from veilhead_service.intake import Intake
from veilhead_service.keys import KeyStore
from veilhead_service.limits import Budget, Period, Rate
from veilhead_service.loads import read_catalogue
from veilhead_service.model_status import ModelStatus
from veilhead_service.model_store import ModelSource, ModelStore
from veilhead_service.observation import ObservationMiddleware
from veilhead_service.routes import Services
from veilhead_service.settings import Settings
from veilhead_service.store_versions import check_store_format
from veilhead_service.strangers import Strangers
from veilhead_service.telemetry import Telemetry
from veilhead_service.tenant_access import TenantAccess
from veilhead_service.tracing import Tracing
from veilhead_service.workers import WorkerPool


class _RequestContext:
    """Gives every request a random id, which its answer carries, and every failure an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            problem = problems.of_failure(request_id, error)
            if not started:
                await problems.respond(Request(scope), problem)(scope, receive, send_with_id)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start and end the app; what fails is told in one line, and never as a traceback."""

        async def send_in_short(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed":
                failure = getattr(scope["app"].state, "failure", None)
                why = "it was interrupted" if failure is None else reason_of(failure)
                message = {**message, "message": f"the service cannot start: {why}"}
            elif message["type"] == "lifespan.shutdown.failed":
                message = {**message, "message": "the service did not end as it should"}
            await send(message)

        await self._app(scope, receive, send_in_short)


def _access_log(settings: Settings) -> AccessLog | None:
    """The access log that the settings ask for; the lifespan opens it."""
    if settings.access_log_mode == "off":
        return None
    return AccessLog(
        settings.state_directory / FILE_NAME,
        sync_seconds=settings.access_log_sync_seconds,
        file_bytes=settings.access_log_file_bytes,
        reserve_bytes=settings.disk_reserve_bytes,
    )


def create_app(settings: Settings, *, models: ModelSource | None = None) -> FastAPI:
    """The service as an ASGI application.

    Args:
        settings: what the operator set.
        models: where models come from; the store of the settings when it is None.

    The workers start and end with the application's lifespan.

    Raises:
        StoreError: when the store is of another format.
    """
    head_key = settings.open_head_key()
    source = models
    if source is None:
        check_store_format(settings.store)
        source = ModelStore(
            settings.store,
            head_key_id=None if head_key is None else head_key.id,
            require_encrypted_heads=settings.require_encrypted_heads,
        )
    pool = WorkerPool(
        settings.workers,
        waiting_per_worker=settings.waiting_per_worker,
        evaluation_seconds=settings.evaluation_seconds,
        load_seconds=settings.load_seconds,
        queue_seconds=settings.queue_seconds,
        memory_bytes=settings.worker_memory_bytes,
        head_bytes=settings.worker_head_bytes,
        zeros_ahead=settings.worker_zeros_ahead,
        max_evaluations=settings.worker_max_evaluations,
        catalogue=lambda: read_catalogue(source),
        head_key=head_key,
        shared=not settings.insecure_no_tenants,
    )
    log = _access_log(settings)
    access = (
        InsecureAccess()
        if settings.insecure_no_tenants
        else TenantAccess(
            settings.state_directory,
            rate=Rate(settings.rate_per_second, settings.rate_burst),
            budget=Budget(settings.query_budget, Period(settings.query_budget_period)),
            log=log,
        )
    )
    services = Services(
        models=source,
        keys=KeyStore(
            max_bytes=settings.key_memory_bytes,
            max_tenant_bytes=settings.tenant_key_memory_bytes,
            idle_seconds=settings.key_idle_seconds,
            lifetime_seconds=settings.key_lifetime_seconds,
        ),
        pool=pool,
        intake=Intake(
            max_bodies=settings.max_bodies,
            max_tenant_bodies=settings.tenant_max_bodies,
            max_downloads=settings.max_downloads,
            body_seconds=settings.body_seconds,
            shared=not settings.insecure_no_tenants,
        ),
        access=access,
        telemetry=Telemetry(),
        strangers=Strangers(log),
    )
    services.telemetry.watch(telemetry.key_metrics(services.keys))
    services.telemetry.watch(telemetry.pool_metrics(pool.stats))
    if log is not None:
        services.telemetry.watch(telemetry.access_log_metrics(log))
    tracing = Tracing.over_otlp(settings.tracing_endpoint) if settings.tracing else None
    # Models that are not of a store are nobody's whom the vendor's command could tell of them.
    status = ModelStatus(settings.state_directory, pool) if models is None else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        process = process_mark()
        try:
            try:
                if log is not None:
                    log.start()
                await access.start()
                await pool.start()
                if status is not None:
                    status.start()
            except Exception as error:
                app.state.failure = error  # `serve` tells it
                raise
            yield
        finally:
            if process == process_mark():  # nothing of it runs in a copy of this process
                if status is not None:
                    await status.stop()
                await pool.stop()
                await access.stop()
                services.strangers.tell()
                if log is not None:
                    log.stop()
                if tracing is not None:
                    tracing.stop()

    app = FastAPI(
        title="Veilhead",
        version=version("veilhead"),
        summary="Private text classification on encrypted embeddings",
        lifespan=lifespan,
        redoc_url=None,
        # A redirect would repeat the Host and the query of the request, and decode the latter.
        redirect_slashes=False,
        # FastAPI's own spans and logs would hold paths, query strings and exception messages.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.services = services
    routes.install(app)
    problems.install(app)
    # The last one added is the first that a request meets.
    app.add_middleware(AccessGate, access=access)
    app.add_middleware(_RequestContext)
    app.add_middleware(
        ObservationMiddleware,
        telemetry=services.telemetry,
        strangers=services.strangers,
        tracing=tracing,
        access_log=log,
        log_required=settings.access_log_mode == "required",
        templates=[
            route.path for route in (*routes.router.routes, *app.routes) if isinstance(route, Route)
        ],
    )
    return app
