"""The line of queries before the workers: bounded, and shared fairly by the tenants.

Who is next is found by deficit round-robin (Shreedhar and Varghese, "Efficient fair queueing using
deficit round robin", SIGCOMM 1995): tenants that wait take turns, and every turn lets a tenant's
queries pass whose costs add up to one quantum, with what it did not use kept for its next turn. A
tenant with one query waits for one turn of each other tenant, however many queries they have.

Who may wait at all: a tenant has no more queries here than there are places left (the dynamic
threshold of Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998). One tenant alone
gets half of the places, two get a third each; places for others are always left.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from veilhead_protocol.errors import QueueFullError

#: Units of a layout's cost that one turn is worth: about one query of a single text.
QUANTUM: Final = 50

_Server = TypeVar("_Server")


@dataclass
class _Share(Generic[_Server]):
    """One tenant's queries, oldest first, with their costs, and what is left of its turns."""

    waiting: deque[tuple[int, asyncio.Future[_Server]]] = field(default_factory=deque)
    deficit: int = 0
    in_turn: bool = False


class FairLine(Generic[_Server]):
    """Queries that wait for one of several servers."""

    def __init__(self, capacity: int, *, shared: bool) -> None:
        """Make an empty line.

        Args:
            capacity: queries that may wait.
            shared: whether places are left for other tenants; without it one may take them all.
        """
        self._capacity = capacity
        self._shared = shared
        self._places: Counter[str] = Counter()  # by tenant; only those that have some
        self._held = 0
        self._shares: OrderedDict[str, _Share[_Server]] = OrderedDict()  # in the order of turns

    def __len__(self) -> int:
        """Queries that wait."""
        return self._held

    def check(self, tenant: str) -> None:
        """See whether this tenant may wait with one more query.

        Raises:
            QueueFullError: when the line is full, or this tenant's share of it.
        """
        left = self._capacity - self._held
        if left <= 0:
            raise QueueFullError("too many queries are waiting; send the same query again later")
        if self._shared and self._places[tenant] >= left:
            raise QueueFullError(
                "too many queries of this tenant are waiting; send the same query again later"
            )

    @contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """Hold a place for a query of this tenant in this block.

        Raises:
            QueueFullError: as `check` does, before the block.
        """
        self.check(tenant)
        self._places[tenant] += 1
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            self._places[tenant] -= 1
            if not self._places[tenant]:
                del self._places[tenant]

    def join(self, tenant: str, cost: int) -> asyncio.Future[_Server]:
        """Stand in the line with a query of this cost; the future's result is a server.

        A future that is done before its turn, by whoever waits for it, is passed over.
        """
        future: asyncio.Future[_Server] = asyncio.get_running_loop().create_future()
        share = self._shares.get(tenant)
        if share is None:
            share = self._shares[tenant] = _Share()
        share.waiting.append((cost, future))
        return future

    def next(self) -> asyncio.Future[_Server] | None:
        """Take the query whose turn it is out of the line; None when nobody waits."""
        while self._shares:
            tenant, share = next(iter(self._shares.items()))
            while share.waiting and share.waiting[0][1].done():
                share.waiting.popleft()
            if not share.waiting:
                del self._shares[tenant]  # and what is left of its turns
                continue
            if not share.in_turn:
                share.in_turn = True
                share.deficit += QUANTUM
            cost, future = share.waiting[0]
            if cost <= share.deficit:
                share.deficit -= cost
                share.waiting.popleft()
                if not share.waiting:
                    del self._shares[tenant]
                return future
            share.in_turn = False
            self._shares.move_to_end(tenant)
        return None

    def fail_all(self, error: Exception) -> None:
        """End the waiting of everybody with this error."""
        while (future := self.next()) is not None:
            future.set_exception(error)
