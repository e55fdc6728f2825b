"""Who may do what: API keys, scopes, rates and budgets, before a route sees a request.

`AccessGate` stands in front of every route, those of the framework and paths without a route too.
A request without a good key gets the same 401 wherever it goes, and its body is never read.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, Protocol

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from veilhead_protocol.errors import VeilheadError
from veilhead_service import problems
from veilhead_service.limits import Budget, Rate, Usage
from veilhead_service.problems import Problem
from veilhead_service.tenants import INSECURE_TENANT, KeyScope

#: What anybody may ask: whether the service is up.
OPEN_PATHS: Final = frozenset({"/livez", "/readyz"})

#: The scope that a path needs. Any good key opens the others.
_SCOPES: Final = (
    (re.compile(r"/v1/models/[^/]+/infer/?"), KeyScope.INFER),
    (re.compile(r"/v1/models(?:/.*)?", re.DOTALL), KeyScope.MODELS),
    (re.compile(r"/v1/keys(?:/.*)?", re.DOTALL), KeyScope.INFER),
    (re.compile(r"/v1/usage/?"), KeyScope.USAGE),
    (re.compile(r"/metrics(?:/.*)?", re.DOTALL), KeyScope.METRICS),
)


def scope_of(path: str) -> KeyScope | None:
    """The scope that a path needs; None when any good key will do."""
    for pattern, scope in _SCOPES:
        if pattern.fullmatch(path):
            return scope
    return None


class Access(Protocol):
    """Who may do what, and what it costs them."""

    async def start(self) -> None:
        """Make ready; raises StateError when that fails."""

    async def stop(self) -> None:
        """Let go of what `start` opened."""

    async def ready(self) -> bool:
        """Whether it can be known now who may do what."""

    async def admit(self, authorization: list[str], path: str) -> str:
        """The tenant of a request with these Authorization headers, which may ask for this path.

        Raises:
            Problem: unauthenticated, forbidden or rate-limited.
            StateError: when it cannot be known.
        """

    async def confirm(self, authorization: list[str], path: str) -> None:
        """See that an admitted request may still be answered: its body may have taken long.

        Raises:
            Problem: unauthenticated or forbidden.
            StateError: when it cannot be known.
        """

    def count_registration(self, tenant: str) -> None:
        """Count a key that came with an admitted query as the request that it saves."""

    def charged(
        self, tenant: str, model: str, units: int, default: Budget | None = None
    ) -> AbstractAsyncContextManager[None]:
        """Charge a budget for what the block does; given back when the block fails.

        `default` is the budget of the model's policy: that of a tenant that has none of its own.

        Raises:
            Problem: budget-exhausted, before the block.
            StateError: when it cannot be charged; the block does not run then.
        """

    async def usage(
        self, tenant: str, models: Mapping[str, Budget | None]
    ) -> tuple[Rate | None, list[Usage]]:
        """A tenant's rate (None for no limit) and its budgets: of these models, and in use.

        The models come with the budgets of their policies.

        Raises:
            StateError: when the state cannot be read.
        """

    async def usage_snapshot(self, models: Mapping[str, Budget | None]) -> list[Usage]:
        """The current period of every budget that is set or in use, of all tenants, for metrics.

        Raises:
            StateError: when the state cannot be read.
        """


class InsecureAccess:
    """Access without tenants: everybody who reaches the service may do everything, uncounted."""

    async def start(self) -> None:
        """There is nothing to open."""

    async def stop(self) -> None:
        """There is nothing to close."""

    async def ready(self) -> bool:
        """There is nothing to look up."""
        return True

    async def admit(self, authorization: list[str], path: str) -> str:  # noqa: ARG002
        """Everybody is the same tenant."""
        return INSECURE_TENANT

    async def confirm(self, authorization: list[str], path: str) -> None:
        """Everybody may."""

    def count_registration(self, tenant: str) -> None:
        """Nothing is counted."""

    @asynccontextmanager
    async def charged(
        self,
        tenant: str,  # noqa: ARG002
        model: str,  # noqa: ARG002
        units: int,  # noqa: ARG002
        default: Budget | None = None,  # noqa: ARG002
    ) -> AsyncIterator[None]:
        """There are no budgets."""
        yield

    async def usage(
        self,
        tenant: str,  # noqa: ARG002
        models: Mapping[str, Budget | None],  # noqa: ARG002
    ) -> tuple[Rate | None, list[Usage]]:
        """Nothing is counted."""
        return None, []

    async def usage_snapshot(self, models: Mapping[str, Budget | None]) -> list[Usage]:  # noqa: ARG002
        """Nothing is counted."""
        return []


class AccessGate:
    """Lets a request through to the app once its tenant is known: `request.state.tenant`."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request here, or hand it on."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            tenant = await self._access.admit(
                request.headers.getlist("authorization"), scope["path"]
            )
            if scope["path"].endswith("\n"):
                # The router's patterns end with `$`, which lets a line feed pass, and so would
                # find the routes of paths that have no scope here.
                raise problems.not_found()
        except Problem as problem:
            await problems.respond(request, problem)(scope, receive, send)
        except VeilheadError as error:
            await problems.respond(request, problems.of_error(error))(scope, receive, send)
        else:
            request.state.tenant = tenant
            await self._app(scope, receive, send)
