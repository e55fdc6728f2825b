"""Who may do what: API keys, scopes, rates and budgets, before a route sees a request.

`AccessGate` stands in front of every route, those of the framework and paths without a route too.
A request without a good key gets the same 401 wherever it goes, and its body is never read.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Final, Protocol, TypeVar

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from veilhead_protocol.errors import StateError, VeilheadError
from veilhead_service import problems
from veilhead_service.limits import Budget, Rate, RateLimiter, Usage
from veilhead_service.problems import Problem
from veilhead_service.state import State
from veilhead_service.tenants import INSECURE_TENANT, ApiKey, KeyScope, Tenant, key_id_of, opens

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

#: Seconds after which the state is asked whether anything changed: how late a revocation is seen.
_FRESH_SECONDS: Final = 0.25

logger = logging.getLogger("veilhead.service")

_Value = TypeVar("_Value")


def scope_of(path: str) -> KeyScope | None:
    """The scope that a path needs; None when any good key will do."""
    for pattern, scope in _SCOPES:
        if pattern.fullmatch(path):
            return scope
    return None


@dataclass(frozen=True)
class _Directory:
    """Tenants and keys, as they were in the state at one moment."""

    version: int
    tenants: dict[str, Tenant]
    keys: dict[str, ApiKey]


@dataclass(frozen=True)
class _Exhausted:
    """A charge that the state refused, and what the state held then, which others may change."""

    usage: Usage
    units: int
    default: Budget
    directory: _Directory


class Access(Protocol):
    """Who may do what, and what it costs them."""

    async def start(self) -> None:
        """Make ready; raises StateError when that fails."""

    async def stop(self) -> None:
        """Let go of what `start` opened."""

    async def admit(self, authorization: list[str], path: str) -> str:
        """The tenant of a request with these Authorization headers, which may ask for this path.

        Raises:
            Problem: unauthenticated, forbidden or rate-limited.
            StateError: when it cannot be known.
        """

    def count_registration(self, tenant: str) -> None:
        """Count a key that came with an admitted query as the request that it saves.

        Raises:
            Problem: rate-limited.
        """

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


class TenantAccess:
    """Access by API keys, on a state that others may change meanwhile.

    The state is opened at `start`, or by the first request. It is used by one thread, so that no
    disk and no lock ever holds up the event loop.
    """

    def __init__(
        self,
        state_directory: Path,
        *,
        rate: Rate,
        budget: Budget,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Access by what a state holds.

        Args:
            state_directory: where the state is.
            rate: of a tenant that has none of its own.
            budget: of a tenant and model that have none of their own.
            clock: seconds since 1970, for expiry and periods.
            monotonic: seconds that only ever advance, for rates.
        """
        self._state_directory = state_directory
        self._rate = rate
        self._budget = budget
        self._clock = clock
        self._monotonic = monotonic
        self._limiter = RateLimiter(clock=monotonic)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="veilhead-state")
        self._state: State | None = None
        self._directory: _Directory | None = None
        self._checked = -math.inf
        self._exhausted: dict[tuple[str, str], _Exhausted] = {}

    async def start(self) -> None:
        """Open the state."""
        directory = await self._in_thread(self._refresh)
        if not directory.keys:
            logger.warning(
                "there is no tenant yet, so nobody may ask anything: `veilhead-server tenants add "
                "NAME` makes one; on loopback, `--insecure-no-tenants` does without"
            )

    async def stop(self) -> None:
        """Close the state."""
        if self._state is not None:
            await self._in_thread(self._state.close)
        self._state = None
        self._directory = None
        self._checked = -math.inf

    async def admit(self, authorization: list[str], path: str) -> str:
        """Authenticate, then look at the scope, then at the rate."""
        directory = await self._current()
        scheme, _, written = (
            authorization[0].partition(" ") if len(authorization) == 1 else ("", "", "")
        )
        key = directory.keys.get(key_id_of(written) or "")
        is_open = opens(key, written, now=self._clock())
        if key is None or not is_open or scheme.lower() != "bearer":
            raise Problem(
                HTTPStatus.UNAUTHORIZED,
                "unauthenticated",
                "expected Authorization: Bearer and an API key of this service that is neither "
                "expired nor revoked",
                headers={"WWW-Authenticate": "Bearer"},
            )
        needed = scope_of(path)
        if needed is not None and needed not in key.scopes:
            raise Problem(
                HTTPStatus.FORBIDDEN,
                "forbidden",
                f"the API key lacks the scope {needed}; the vendor can make one that has it",
                tenant=key.tenant,
            )
        self._take(directory, key.tenant)
        return key.tenant

    def count_registration(self, tenant: str) -> None:
        """Take one more request from the tenant's rate."""
        if self._directory is not None and tenant in self._directory.tenants:
            self._take(self._directory, tenant)

    def _take(self, directory: _Directory, tenant: str) -> None:
        wait = self._limiter.take(tenant, self._rate_of(directory, tenant))
        if wait > 0:
            raise Problem(
                HTTPStatus.TOO_MANY_REQUESTS,
                "rate-limited",
                "too many requests of this tenant at once; send the same request again later",
                retryable=True,
                headers={"Retry-After": _whole(wait)},
                tenant=tenant,
            )

    @asynccontextmanager
    async def charged(
        self, tenant: str, model: str, units: int, default: Budget | None = None
    ) -> AsyncIterator[None]:
        """Charge, and give back when the block raises.

        Only a block that was cancelled stays charged: nobody knows how far it came.
        """
        default = default or self._budget
        self._refuse_exhausted(tenant, model, units, default)
        taken = await self._in_thread(lambda: self._opened().charge(tenant, model, units, default))
        if isinstance(taken, Usage):
            if self._directory is not None:
                self._exhausted[tenant, model] = _Exhausted(taken, units, default, self._directory)
            raise self._exhausted_problem(taken)
        try:
            yield
        except Exception:
            try:
                await self._in_thread(lambda: self._opened().refund(taken))
            except StateError as error:
                logger.error("a charge could not be given back: %s", error)
            self._exhausted.pop((tenant, model), None)
            raise

    async def usage(
        self, tenant: str, models: Mapping[str, Budget | None]
    ) -> tuple[Rate | None, list[Usage]]:
        """The tenant's rows, sorted by model; unused models have their policy's budget."""
        directory = await self._current()
        budgets = {model: budget or self._budget for model, budget in models.items()}
        found = await self._in_thread(
            lambda: self._opened().usage(self._budget, tenant=tenant, of_models=budgets)
        )
        now = self._clock()
        rows = {
            model: Usage(tenant, model, budget, 0, budget.period.ends(now))
            for model, budget in budgets.items()
        }
        rows |= {usage.model: usage for usage in found}
        return self._rate_of(directory, tenant), [rows[model] for model in sorted(rows)]

    async def usage_snapshot(self, models: Mapping[str, Budget | None]) -> list[Usage]:
        """All tenants' rows."""
        budgets = {model: budget or self._budget for model, budget in models.items()}
        return await self._in_thread(lambda: self._opened().usage(self._budget, of_models=budgets))

    def _refuse_exhausted(self, tenant: str, model: str, units: int, default: Budget) -> None:
        """Refuse what was refused before, without asking the state again.

        Raises:
            Problem: budget-exhausted.
        """
        found = self._exhausted.get((tenant, model))
        if found is None:
            return
        same = found.directory is self._directory and found.default == default
        if not same or found.usage.ends <= self._clock():
            del self._exhausted[tenant, model]  # another budget, perhaps, or another period
        elif units >= found.units:
            raise self._exhausted_problem(found.usage)

    def _exhausted_problem(self, usage: Usage) -> Problem:
        return Problem(
            HTTPStatus.TOO_MANY_REQUESTS,
            "budget-exhausted",
            f"no queries of this model are left in this {usage.budget.period} (UTC); "
            "GET /v1/usage shows the budgets",
            retryable=True,
            headers={"Retry-After": _whole(usage.ends - self._clock())},
        )

    def _rate_of(self, directory: _Directory, name: str) -> Rate:
        tenant = directory.tenants[name]
        return Rate(
            tenant.rate_per_second or self._rate.per_second, tenant.burst or self._rate.burst
        )

    async def _current(self) -> _Directory:
        if self._directory is None or self._monotonic() - self._checked >= _FRESH_SECONDS:
            return await self._in_thread(self._refresh)
        return self._directory

    async def _in_thread(self, call: Callable[[], _Value]) -> _Value:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    # --- in the state's thread --------------------------------------------------------------------

    def _opened(self) -> State:
        if self._state is None:
            self._state = State(self._state_directory, clock=self._clock)
        return self._state

    def _refresh(self) -> _Directory:
        state = self._opened()
        now = self._monotonic()
        version = state.data_version()
        directory = self._directory
        if directory is None or directory.version != version:
            # A change between these reads changes the number again, and is read the next time.
            # Keys come first: tenants are never deleted, so every key finds its tenant.
            keys = {key.id: key for key in state.api_keys()}
            tenants = {tenant.name: tenant for tenant in state.tenants()}
            directory = _Directory(version, tenants, keys)
        self._directory, self._checked = directory, now
        return directory


class InsecureAccess:
    """Access without tenants: everybody who reaches the service may do everything, uncounted."""

    async def start(self) -> None:
        """There is nothing to open."""

    async def stop(self) -> None:
        """There is nothing to close."""

    async def admit(self, authorization: list[str], path: str) -> str:  # noqa: ARG002
        """Everybody is the same tenant."""
        return INSECURE_TENANT

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


def _whole(seconds: float) -> str:
    return str(max(1, math.ceil(seconds)))
