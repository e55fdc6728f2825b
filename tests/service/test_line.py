"""The line before the workers: bounded, and shared fairly by the tenants."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import ExitStack, suppress

import pytest

from veilhead_protocol.errors import QueueFullError
from veilhead_service.line import QUANTUM, FairLine


def served(queries, count=None, *, capacity=10_000):
    """The tenants of (tenant, cost) pairs in the order in which they are served."""

    async def serve():
        line = FairLine(capacity, shared=True)
        owners = {}
        for tenant, cost in queries:
            owners[line.join(tenant, cost)] = tenant
        order = []
        while (count is None or len(order) < count) and (future := line.next()) is not None:
            order.append(owners[future])
        return order

    return asyncio.run(serve())


def test_one_tenants_queries_are_served_in_their_order():
    async def run():
        line = FairLine(8, shared=True)
        futures = [line.join("one", cost) for cost in (40, 4000, 1)]
        assert [line.next() for _ in range(4)] == [*futures, None]

    asyncio.run(run())


def test_a_query_of_another_tenant_overtakes_a_long_line():
    order = served([("heavy", 41)] * 100 + [("light", 41)])
    assert order.index("light") <= 2
    assert len(order) == 101


def test_tenants_get_equal_work_whatever_a_query_costs():
    """One asks for dear queries, one for cheap ones, and one for many at once."""
    queries = [("dear", 400)] * 50 + [("cheap", 20)] * 1000 + [("usual", 41)] * 500
    costs = {"dear": 400, "cheap": 20, "usual": 41}
    work = Counter()
    for tenant in served(queries, 600):
        work[tenant] += costs[tenant]
    assert max(work.values()) - min(work.values()) <= 450


def test_what_a_turn_did_not_use_is_not_kept_by_who_leaves():
    """A tenant that comes again and again with one query gains nothing by it."""

    async def run():
        line = FairLine(1000, shared=True)
        for _ in range(100):
            line.join("steady", QUANTUM)
        steady = comes = 0
        for _ in range(50):
            mine = line.join("comes", 1)
            while line.next() is not mine:
                steady += 1
            comes += 1
        return steady, comes

    steady, comes = asyncio.run(run())
    assert comes == 50
    assert steady >= 49  # one turn each


def test_who_has_gone_is_passed_over():
    async def run():
        line = FairLine(8, shared=True)
        first, second, third = (line.join("one", 10) for _ in range(3))
        other = line.join("other", 10)
        first.cancel()
        other.cancel()
        assert [line.next(), line.next(), line.next()] == [second, third, None]

    asyncio.run(run())


def test_places_for_others_are_always_left():
    """One alone gets half of the line, two a third each; a newcomer is never kept out."""
    line = FairLine(60, shared=True)

    def fill(tenant):
        taken = 0
        with suppress(QueueFullError):
            while True:
                held.enter_context(line.place(tenant))
                taken += 1
        with pytest.raises(QueueFullError, match="of this tenant"):
            line.check(tenant)
        return taken

    held = ExitStack()
    assert fill("heavy") == 30
    assert fill("second") == 15
    assert fill("heavy") == 0  # it has more than are left
    for number in range(4):
        with line.place(f"light-{number}"):
            assert len(line) == 46
    held.close()
    assert len(line) == 0
    assert fill("third") == 30
    held.close()


def test_a_refusal_costs_no_place_and_a_failure_gives_it_back():
    line = FairLine(2, shared=True)
    with line.place("one"):
        with pytest.raises(QueueFullError), line.place("one"):
            raise AssertionError("it was let in")
        with pytest.raises(ZeroDivisionError), line.place("two"):
            raise ZeroDivisionError
        assert len(line) == 1
    assert len(line) == 0


def test_without_tenants_the_whole_line_is_for_everybody():
    line = FairLine(3, shared=False)
    with line.place(""), line.place(""), line.place(""), pytest.raises(QueueFullError):
        line.check("")


def test_everybody_who_waits_is_told_of_the_end():
    async def run():
        line = FairLine(8, shared=True)
        futures = [line.join(tenant, 10_000) for tenant in ("one", "two", "one")]
        line.fail_all(QueueFullError("over"))
        for future in futures:
            with pytest.raises(QueueFullError):
                await future
        assert line.next() is None

    asyncio.run(run())


def test_a_query_of_the_largest_cost_is_found_quickly():
    """A turn is worth little; the dearest layouts cost a million units."""
    order = served([(f"tenant {number}", 2**20) for number in range(4)])
    assert len(order) == 4
