"""Access by API keys, on a state that others may change meanwhile: rates, budgets, upkeep."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Final

from veilhead_protocol.errors import AccessLogError, StateError, VeilheadError
from veilhead_service import witness
from veilhead_service.access import scope_of
from veilhead_service.access_log import AccessLog
from veilhead_service.access_log_chain import FILE_NAME, end_of
from veilhead_service.limits import Budget, Charge, Rate, RateLimiter, Usage
from veilhead_service.problems import Problem
from veilhead_service.state import State
from veilhead_service.state_lane import Lane
from veilhead_service.tenants import ApiKey, Tenant, key_id_of, opens

#: Seconds after which the state is asked whether anything changed: how late a revocation is seen.
_FRESH_SECONDS: Final = 0.25

#: What others than our commands wrote is read after so long.
_RELOAD_SECONDS: Final = 2.0

#: A budget that is used up is asked about again after so long: what others than our commands gave.
_EXHAUSTED_SECONDS: Final = 30.0

#: Counts of old periods are looked for as often as this.
_PRUNE_SECONDS: Final = 3600.0

logger = logging.getLogger("veilhead.service")


@dataclass(frozen=True)
class _Directory:
    """Tenants and keys, as they were in the state at one moment."""

    commands: int
    version: int
    loaded: float
    tenants: dict[str, Tenant]
    keys: dict[str, ApiKey]


@dataclass(frozen=True)
class _Exhausted:
    """A charge that the state refused, after how many commands, and when."""

    usage: Usage
    units: int
    default: Budget
    commands: int
    since: float


class TenantAccess:
    """Access by API keys, on a state that others may change meanwhile.

    The state is opened at `start`, or by the first request. Four threads use it, each over a
    connection of its own: one looks keys up, one charges, one counts, one looks after the file. So
    no disk and no lock holds up the event loop, and who only asks waits for none who writes.

    From `start` to `stop` it is looked at several times a second: whether it is still the same
    file, what the operator changed, and whether the access log knows of all keys that were ended.
    """

    def __init__(
        self,
        state_directory: Path,
        *,
        rate: Rate,
        budget: Budget,
        log: AccessLog | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Access by what a state holds.

        Args:
            state_directory: where the state is, and the access log.
            rate: of a tenant that has none of its own.
            budget: of a tenant and model that have none of their own.
            log: the access log that this process writes, when it does.
            clock: seconds since 1970, for expiry and periods.
            monotonic: seconds that only ever advance, for rates.
        """
        self._state_directory = state_directory
        self._rate = rate
        self._budget = budget
        self._log = log
        self._clock = clock
        self._monotonic = monotonic
        self._limiter = RateLimiter(clock=monotonic)
        self._opening = threading.Lock()
        self._state: State | None = None
        self._keys = Lane("keys", self._opened)
        self._charges = Lane("charges", self._opened_beside)
        self._counts = Lane("counts", self._opened_beside)
        self._upkeep = Lane("upkeep", self._opened_beside)
        self._watching: asyncio.Task[None] | None = None
        self._directory: _Directory | None = None
        self._checked = -math.inf
        self._agreed = False
        self._introduced = False
        self._owed: deque[Charge] = deque()
        self._exhausted: dict[tuple[str, str], _Exhausted] = {}
        self._told = ""

    async def start(self) -> None:
        """Open the state; one that must not be used is told of, and refused until it may be."""
        await self._keys.run(lambda _: None)
        try:
            directory = await self._current()
        except StateError as error:
            self._tell(error)
        else:
            if not directory.keys:
                logger.warning(
                    "there is no tenant yet, so nobody may ask anything: `veilhead-server tenants "
                    "add NAME` makes one; on loopback, `--insecure-no-tenants` does without"
                )
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Close the state."""
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        self._watching = None
        with suppress(StateError):
            await self._give_back()
        # The connection that adopted the file is closed last: it knows what took its place.
        for lane in (self._charges, self._counts, self._upkeep, self._keys):
            await lane.close()
        self._state = None
        self._directory = None
        self._agreed = self._introduced = False
        self._checked = -math.inf

    async def ready(self) -> bool:
        """Whether keys can be looked up."""
        try:
            await self._current()
        except StateError as error:
            self._tell(error)
            return False
        return True

    async def admit(self, authorization: list[str], path: str) -> str:
        """Authenticate, then look at the scope, then at the rate."""
        directory = await self._current()
        tenant = self._authenticated(directory, authorization, path).tenant
        self._take(directory, tenant)
        return tenant

    async def confirm(self, authorization: list[str], path: str) -> None:
        """Authenticate, and look at the scope, once more."""
        self._authenticated(await self._current(), authorization, path)

    def _authenticated(self, directory: _Directory, authorization: list[str], path: str) -> ApiKey:
        """The API key of a request, when it opens this path."""
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
        return key

    def count_registration(self, tenant: str) -> None:
        """Take one more request from the tenant's rate: its next ones wait for it."""
        self._limiter.debit(tenant)

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
        # Before the charge: a command that comes meanwhile makes it another number.
        directory, now = self._directory, self._monotonic()
        taken = await self._charges.run(lambda state: state.charge(tenant, model, units, default))
        if isinstance(taken, Usage):
            if directory is not None:
                self._exhausted[tenant, model] = _Exhausted(
                    taken, units, default, directory.commands, now
                )
            raise self._exhausted_problem(taken)
        try:
            yield
        except Exception:
            self._owed.append(taken)
            with suppress(StateError):  # it is given back as soon as the state can be written
                await self._give_back()
            raise

    async def usage(
        self, tenant: str, models: Mapping[str, Budget | None]
    ) -> tuple[Rate | None, list[Usage]]:
        """The tenant's rows, sorted by model; unused models have their policy's budget."""
        directory = await self._current()
        budgets = {model: budget or self._budget for model, budget in models.items()}
        found = await self._counts.run(
            lambda state: state.usage(self._budget, tenant=tenant, of_models=budgets)
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
        return await self._counts.run(lambda state: state.usage(self._budget, of_models=budgets))

    def _refuse_exhausted(self, tenant: str, model: str, units: int, default: Budget) -> None:
        """Refuse what was refused before, without asking the state again.

        Raises:
            Problem: budget-exhausted.
        """
        found = self._exhausted.get((tenant, model))
        if found is None:
            return
        directory = self._directory
        same = (
            directory is not None
            and directory.commands == found.commands
            and found.default == default
            and self._monotonic() - found.since < _EXHAUSTED_SECONDS
            and self._clock() < found.usage.ends
        )
        if not same:
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
            return await self._keys.run(self._refresh)
        return self._directory

    # --- all the time -----------------------------------------------------------------------------

    async def _watch(self) -> None:
        prune_at = self._monotonic()
        while True:
            try:
                await self._current()
                await self._record()
                await self._give_back()
                if self._charges.needs_checkpoint:
                    await self._checkpoint()
                if self._monotonic() >= prune_at and not await self._upkeep.run(State.prune):
                    prune_at = self._monotonic() + _PRUNE_SECONDS
                self._tell(None)
            except (StateError, AccessLogError) as error:
                self._tell(error)
            except Exception as error:
                self._tell(StateError(f"looking after the state failed: {type(error).__name__}"))
            await asyncio.sleep(_FRESH_SECONDS)

    async def _checkpoint(self) -> None:
        await self._upkeep.run(State.checkpoint)
        self._charges.was_checkpointed()

    async def _record(self) -> None:
        """Have the access log say which state this is, and which keys were ended in it."""
        log = self._log
        if log is None or not log.running:
            return
        known = await self._upkeep.run(witness.witness_of)
        if known != log.end.witness or not self._introduced:
            introduce = not self._introduced
            await self._upkeep.run(
                lambda state: witness.write_endings(state, log, introduce=introduce)
            )
            self._introduced = True

    async def _give_back(self) -> None:
        while self._owed:
            taken = self._owed.popleft()
            try:
                await self._charges.run(partial(State.refund, charge=taken))
            except StateError:
                self._owed.appendleft(taken)
                raise
            self._exhausted.pop((taken.tenant, taken.model), None)

    def _tell(self, error: VeilheadError | None) -> None:
        """Log what is wrong once, and once that it is over."""
        told, self._told = self._told, "" if error is None else str(error)
        if self._told and self._told != told:
            logger.error("state-unavailable: %s", self._told)
        elif told and not self._told:
            logger.warning("the state can be used again")

    # --- in the state's threads -------------------------------------------------------------------

    def _opened(self) -> State:
        with self._opening:
            if self._state is None:
                self._state = State(self._state_directory, clock=self._clock)
                self._state.adopt()
            return self._state

    def _opened_beside(self) -> State:
        self._opened()
        return State(self._state_directory, clock=self._clock, beside=True)

    def _refresh(self, state: State) -> _Directory:
        now = self._monotonic()
        directory = self._directory
        if directory is not None and now - self._checked < _FRESH_SECONDS:
            return directory  # another request just had it looked at
        try:
            self._directory = self._looked_up(state, directory, now)
        except BaseException:
            self._directory = None  # nobody goes on with what may have changed
            raise
        self._checked = now
        return self._directory

    def _looked_up(self, state: State, directory: _Directory | None, now: float) -> _Directory:
        """The directory as the state has it now: this one when nothing changed."""
        if not state.check_whole():
            self._charges.ask_for_checkpoint()
        commands, version = state.commands(), state.data_version()
        if directory is None or directory.commands != commands:
            self._check_agreement(state)
            directory = None
        elif directory.version != version and now - directory.loaded >= _RELOAD_SECONDS:
            directory = None
        if directory is None:
            # A change between these reads changes the numbers again, and is read the next time.
            # Keys come first: tenants are never deleted, so every key finds its tenant.
            keys = {key.id: key for key in state.api_keys()}
            tenants = {tenant.name: tenant for tenant in state.tenants()}
            directory = _Directory(commands, version, now, tenants, keys)
        return directory

    def _check_agreement(self, state: State) -> None:
        path = self._state_directory / FILE_NAME
        log = self._log
        try:
            known = log.end if log is not None and log.running else end_of(path)
            witness.check_agreement(state, known.witness, None if self._agreed else path)
        except AccessLogError as error:
            raise StateError(str(error)) from error
        self._agreed = True


def _whole(seconds: float) -> str:
    return str(max(1, math.ceil(seconds)))
