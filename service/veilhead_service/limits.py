"""Rates, budgets and layouts: what is allowed, without where it is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from veilhead_protocol.errors import LayoutError, MessageLayoutError
from veilhead_protocol.layout import Layout, LayoutKind
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.wire import QueryHeader


class Period(StrEnum):
    """What a budget is for: a calendar day or month, UTC."""

    DAY = "day"
    MONTH = "month"

    def start(self, now: float) -> str:
        """The period that holds `now` (seconds since 1970), as it is written: 2026-11 or -22."""
        form = "%Y-%m-%d" if self is Period.DAY else "%Y-%m"
        return datetime.fromtimestamp(now, UTC).strftime(form)

    def ends(self, now: float) -> float:
        """Seconds since 1970 at which the next period begins."""
        midnight = datetime.fromtimestamp(now, UTC).replace(
            hour=0, minute=0, second=0, microsecond=0
        )
        if self is Period.DAY:
            return (midnight + timedelta(days=1)).timestamp()
        return (midnight.replace(day=1) + timedelta(days=32)).replace(day=1).timestamp()


@dataclass(frozen=True)
class Budget:
    """What a tenant may ask of a model in a period.

    Attributes:
        units: what `charge` counts, or None where there is no limit and queries are only counted.
        period: when it begins anew.
    """

    units: int | None
    period: Period

    def __post_init__(self) -> None:
        if self.units is not None and self.units < 0:
            raise ValueError(f"a budget is not negative, got {self.units}")


def policy_budget(manifest: Manifest) -> Budget | None:
    """The budget that a model's policy gives to tenants that have none of their own."""
    clause = manifest.policy.query_budget
    return None if clause is None else Budget(clause.units, Period(clause.period))


@dataclass(frozen=True)
class Charge:
    """What was taken from a budget, and from which period of it."""

    tenant: str
    model: str
    start: str
    units: int


@dataclass(frozen=True)
class Usage:
    """A tenant's budget of one model and what is used of it.

    Attributes:
        tenant: the tenant's name.
        model: the model's name.
        budget: the limit and its period.
        used: units of the current period.
        ends: seconds since 1970 at which the current period ends.
    """

    tenant: str
    model: str
    budget: Budget
    used: int
    ends: float

    @property
    def remaining(self) -> int | None:
        """Units that are left, or None where there is no limit."""
        return None if self.budget.units is None else max(0, self.budget.units - self.used)


def requested_layout(header: QueryHeader, manifest: Manifest) -> Layout:
    """The canonical layout of a query's number of texts.

    Raises:
        MessageLayoutError: when the model does not take so many.
    """
    try:
        return manifest.layout_of(header.counts.texts)
    except LayoutError as error:
        raise MessageLayoutError(str(error)) from None


def charge(layout: Layout) -> int:
    """Units that one answer costs: what it tells of the head, in ordinary answers.

    Coefficients sent / C: the number of texts. Where a reply polynomial sends more coefficients
    than the hint bound allows, a crafted key could learn the whole head from it, and the answer
    costs at least the d + 1 that determine a linear head. Only bulk passes the bound.
    Source: docs/protocol.md, "Hints about the mask".
    """
    if layout.kind is LayoutKind.BULK:
        return max(layout.texts, layout.dimensions + 1)
    return layout.texts


@dataclass(frozen=True)
class Rate:
    """A rate limit: requests a second in the long run, and as many at once."""

    per_second: float
    burst: int

    def __post_init__(self) -> None:
        if not (self.per_second > 0 and math.isfinite(self.per_second) and self.burst >= 1):
            raise ValueError(
                f"a rate is positive and a burst at least 1, got {self.per_second}, {self.burst}"
            )


class RateLimiter:
    """A token bucket for each tenant. Its clock is monotonic: no jump of the wall clock matters."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # tenant: (tokens, when)

    def take(self, tenant: str, rate: Rate) -> float:
        """Take one request: 0 when it may go on, else the seconds until the next one may."""
        now = self._clock()
        tokens, then = self._buckets.get(tenant, (float(rate.burst), now))
        tokens = min(float(rate.burst), tokens + (now - then) * rate.per_second)
        if tokens < 1:
            self._buckets[tenant] = (tokens, now)
            return (1 - tokens) / rate.per_second
        self._buckets[tenant] = (tokens - 1, now)
        return 0.0

    def debit(self, tenant: str) -> None:
        """Count one more request of a tenant that was just admitted, at the cost of later ones."""
        tokens, then = self._buckets[tenant]
        self._buckets[tenant] = (tokens - 1, then)
