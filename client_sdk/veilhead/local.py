"""The real service, in this process: the same app, workers and bytes, without a socket."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import httpx2

from veilhead_protocol.errors import ClientError

if TYPE_CHECKING:
    from veilhead.client import Client

#: Never resolved: the transport hands requests to the app.
_URL = "http://127.0.0.1"


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


def open_local(make: type[Client], directory: Path, options: dict[str, Any]) -> Client:
    """A client of the artefact in `directory`, which the real service serves in this process.

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
    # One worker: the process that asks is on the same machine.
    # Nobody else reaches it: it listens on no socket.
    settings = Settings(workers=1, host="127.0.0.1", insecure_no_tenants=True)
    app = create_app(settings, models=model)
    options.setdefault("backbone", directory / BACKBONE_DIRECTORY)
    return make(_URL, name, transport=InProcessTransport(app), **options)
