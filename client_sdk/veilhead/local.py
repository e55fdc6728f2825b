"""The real service, in this process: the same app, workers and bytes, without a socket."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx2

from veilhead_protocol.errors import ClientError

#: Never resolved: the transport hands requests to the app.
_URL: Final = "http://127.0.0.1"


class InProcessTransport(httpx2.AsyncBaseTransport):
    """Requests to an ASGI app, whose lifespan is that of the transport as a context manager."""

    def __init__(self, app: Any) -> None:
        self._inner = httpx2.ASGITransport(app)
        self._lifespan = app.router.lifespan_context(app)

    async def __aenter__(self) -> Self:
        await self._lifespan.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self._lifespan.__aexit__(kind, error, traceback)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Let the app answer."""
        return await self._inner.handle_async_request(request)


@dataclass(frozen=True)
class LocalService:
    """What a client needs to reach the real service of one artefact in this process."""

    url: str
    model: str
    backbone: Path
    transport: InProcessTransport


def serve_locally(directory: Path) -> LocalService:
    """The real service of the artefact in `directory`, for a client to start and stop.

    Raises:
        ClientError: when the service's dependencies are missing.
        StoreError: when the directory holds no artefact.
    """
    try:
        from veilhead_models.artifact import BACKBONE_DIRECTORY
        from veilhead_service.app import create_app
        from veilhead_service.model_store import SingleModel
        from veilhead_service.settings import Settings
    except ModuleNotFoundError as error:
        raise ClientError(
            f"Client.local runs the service and needs {error.name!r}: "
            "pip install 'veilhead[service]'"
        ) from error
    model = SingleModel(directory.resolve())
    (name,) = model.names()
    settings = Settings(
        workers=1,  # the process that asks is on the same machine
        host="127.0.0.1",
        insecure_no_tenants=True,  # nobody else reaches it: it listens on no socket
        access_log="off",
        tracing=False,
    )
    return LocalService(
        url=_URL,
        model=name,
        backbone=directory / BACKBONE_DIRECTORY,
        transport=InProcessTransport(create_app(settings, models=model)),
    )
