"""Bodies on their way in and files on their way out: so many at once, and a fair share of them.

A client that sends slowly, or takes slowly, holds a place here and none in the line before the
workers.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus

from starlette.requests import ClientDisconnect

from veilhead_protocol.errors import QueueFullError
from veilhead_service.problems import RETRY_AFTER_SECONDS, Problem


class Places:
    """So many places, of which nobody can take all.

    A tenant gets another one while it has fewer than are free: alone it gets half of them, n heavy
    ones get 1 / (n + 1) each, and as much is always left for who comes next.
    Source: Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet
    switches", IEEE/ACM Transactions on Networking 6 (2), 1998.
    """

    def __init__(self, what: str, total: int, *, most: int, shared: bool = True) -> None:
        """Places for `what`.

        Args:
            what: what takes them, in refusals.
            total: how many there are.
            most: how many one tenant may have in any case.
            shared: False where everybody is the same tenant, which may then have all of them.
        """
        self._what = what
        self._total = total
        self._most = most
        self._shared = shared
        self._taken: Counter[str] = Counter()  # by tenant; only those that have some
        self._count = 0

    def __len__(self) -> int:
        """Places that are taken now."""
        return self._count

    @contextmanager
    def one(self, tenant: str) -> Iterator[None]:
        """Hold a place of this tenant in this block.

        Raises:
            QueueFullError: when all are taken.
            Problem: 429 when the tenant has its share.
        """
        own, free = self._taken[tenant], self._total - self._count
        if own >= self._most or (self._shared and 0 < free <= own):
            raise Problem(
                HTTPStatus.TOO_MANY_REQUESTS,
                "rate-limited",
                f"too many {self._what} of this tenant are on their way; send the same request "
                "later",
                retryable=True,
                headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
            )
        if not free:
            raise QueueFullError(
                f"too many {self._what} are on their way; send the same request later"
            )
        self._taken[tenant] += 1
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1
            self._taken[tenant] -= 1
            if not self._taken[tenant]:
                del self._taken[tenant]


class Intake:
    """Counts and times the bodies that are being read, and counts the files that are sent."""

    def __init__(
        self,
        *,
        max_bodies: int,
        max_tenant_bodies: int,
        body_seconds: float,
        max_downloads: int = 1,
        shared: bool = True,
    ) -> None:
        self._bodies = Places("bodies", max_bodies, most=max_tenant_bodies, shared=shared)
        self.downloads = Places("files", max_downloads, most=max_downloads, shared=shared)
        self._body_seconds = body_seconds

    @property
    def bodies(self) -> int:
        """Bodies that are on their way now."""
        return len(self._bodies)

    @asynccontextmanager
    async def body(self, tenant: str) -> AsyncIterator[None]:
        """Read one body of this tenant in this block.

        Raises:
            QueueFullError: when too many are being read already; nothing of this one was.
            Problem: 429 when too many of this tenant's are, 408 when it does not arrive in time,
                400 when the client goes away.
        """
        with self._bodies.one(tenant):
            try:
                async with asyncio.timeout(self._body_seconds):
                    yield
            except TimeoutError:
                raise Problem(
                    HTTPStatus.REQUEST_TIMEOUT,
                    "body-timeout",
                    f"the body did not arrive within {self._body_seconds:g} seconds",
                    # What is still to come of the body would be read as the next request.
                    headers={"Connection": "close"},
                ) from None
            except ClientDisconnect:
                raise Problem(
                    HTTPStatus.BAD_REQUEST,
                    "body-incomplete",
                    "the connection ended within the body",
                ) from None
