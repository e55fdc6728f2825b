"""Rates, periods and what an answer costs."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from veilhead_protocol.layout import HeadShape, Layout, block_sizes
from veilhead_protocol.parameters import COMPACT, STANDARD
from veilhead_service.limits import Budget, Period, Rate, RateLimiter, charge


class Clock:
    def __init__(self):
        self.now = 50.0

    def __call__(self):
        return self.now


# --- charges ------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [STANDARD, COMPACT])
@pytest.mark.parametrize(
    ("dimensions", "classes", "exponent"),
    [(384, 22, 5), (384, 77, 6), (1, 500, 6), (16, 150, 0), (3000, 3, 6), (4096, 1, 1)],
)
def test_the_single_layout_costs_one_a_text(parameters, dimensions, classes, exponent):
    shape = HeadShape(parameters, dimensions, classes, exponent, 64)
    assert charge(Layout.canonical(shape, 1)) == 1


def test_beyond_the_hint_bound_an_answer_costs_the_head():
    shape = HeadShape(STANDARD, 384, 77, 5, 64, bulk=True)
    bound = shape.max_wanted
    assert bound == 181
    for texts in block_sizes(shape):
        assert charge(Layout.canonical(shape, texts)) == texts
    assert charge(Layout.canonical(shape, bound + 1)) == 385  # d + 1
    short = replace(shape, dimensions=16)
    assert charge(Layout.canonical(short, bound + 1)) == bound + 1
    assert charge(Layout.canonical(shape, 2048)) == 2048
    # The bound depends on the exponent.
    assert charge(Layout.canonical(replace(shape, exponent=6), bound)) == 385


# --- periods ------------------------------------------------------------------------------------


def at(*date):
    return datetime(*date, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("period", "now", "start", "ends"),
    [
        (Period.DAY, at(2026, 11, 22, 23, 59, 59), "2026-11-22", at(2026, 11, 23)),
        (Period.DAY, at(2026, 11, 23), "2026-11-23", at(2026, 11, 24)),
        (Period.DAY, at(2026, 12, 31, 1), "2026-12-31", at(2027, 1, 1)),
        (Period.MONTH, at(2026, 12, 31, 1), "2026-12", at(2027, 1, 1)),
        (Period.MONTH, at(2028, 2, 29), "2028-02", at(2028, 3, 1)),
        (Period.MONTH, at(2026, 1, 31, 23), "2026-01", at(2026, 2, 1)),
    ],
)
def test_periods_are_those_of_the_calendar(period, now, start, ends):
    assert (period.start(now), period.ends(now)) == (start, ends)


@hypothesis_settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.floats(min_value=0, max_value=4e9), st.sampled_from(Period))
def test_a_period_ends_where_the_next_begins(now, period):
    ends = period.ends(now)
    assert now < ends
    assert period.start(ends - 1) == period.start(now) != period.start(ends)


# --- rates --------------------------------------------------------------------------------------


def test_a_burst_goes_at_once_and_then_the_rate_counts():
    clock = Clock()
    limiter, rate = RateLimiter(clock=clock), Rate(2.0, 3)
    assert [limiter.take("a", rate) for _ in range(3)] == [0, 0, 0]
    assert limiter.take("a", rate) == pytest.approx(0.5)
    clock.now += 0.25
    assert limiter.take("a", rate) == pytest.approx(0.25)
    clock.now += 0.25
    assert limiter.take("a", rate) == 0
    assert limiter.take("a", rate) > 0


def test_what_came_along_is_paid_by_later_requests_at_any_rate():
    """A query with its key costs two requests, and a burst of one serves it all the same."""
    clock = Clock()
    limiter, rate = RateLimiter(clock=clock), Rate(0.5, 1)
    served, start = 0, clock.now
    while served < 20:
        wait = limiter.take("a", rate)
        if wait:
            clock.now += wait
            continue
        limiter.debit("a")
        served += 1
    assert clock.now - start == pytest.approx((2 * 20 - 2) / rate.per_second, abs=2)


def test_tenants_do_not_share_a_rate():
    limiter, rate = RateLimiter(clock=Clock()), Rate(1.0, 1)
    assert [limiter.take(name, rate) for name in ("a", "b")] == [0, 0]
    assert limiter.take("a", rate) > 0


def test_rest_saves_no_more_than_a_burst():
    clock = Clock()
    limiter, rate = RateLimiter(clock=clock), Rate(10.0, 2)
    limiter.take("a", rate)
    clock.now += 1e6
    assert [limiter.take("a", rate) > 0 for _ in range(3)] == [False, False, True]


@hypothesis_settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.lists(st.floats(min_value=0, max_value=3), max_size=80), st.integers(1, 5))
def test_no_schedule_passes_the_rate(pauses, burst):
    clock = Clock()
    limiter, rate = RateLimiter(clock=clock), Rate(1.5, burst)
    admitted, start = 0, clock.now
    for pause in pauses:
        clock.now += pause
        wait = limiter.take("a", rate)
        admitted += wait == 0
        assert wait <= 1 / rate.per_second + 1e-9
        assert admitted <= burst + (clock.now - start) * rate.per_second + 1e-6


@pytest.mark.parametrize("make", [lambda: Rate(0, 1), lambda: Rate(1, 0), lambda: Rate(-1, 1)])
def test_a_rate_that_lets_nothing_through_is_none(make):
    with pytest.raises(ValueError, match="positive"):
        make()


def test_a_negative_budget_is_none():
    with pytest.raises(ValueError, match="negative"):
        Budget(-1, Period.DAY)
