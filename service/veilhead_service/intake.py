"""Bodies on their way in: so many at once, so many of one tenant, and each within its time.

A client that sends slowly holds a place here and none in the line before the workers.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from starlette.requests import ClientDisconnect

from veilhead_protocol.errors import QueueFullError
from veilhead_service.problems import RETRY_AFTER_SECONDS, Problem


class Intake:
    """Counts and times the bodies that are being read."""

    def __init__(self, *, max_bodies: int, max_tenant_bodies: int, body_seconds: float) -> None:
        self._max_bodies = max_bodies
        self._max_tenant_bodies = max_tenant_bodies
        self._body_seconds = body_seconds
        self._bodies: Counter[str] = Counter()  # by tenant; only those that have some

    @property
    def bodies(self) -> int:
        """Bodies that are on their way now."""
        return self._bodies.total()

    @asynccontextmanager
    async def body(self, tenant: str) -> AsyncIterator[None]:
        """Read one body of this tenant in this block.

        Raises:
            QueueFullError: when too many are being read already; nothing of this one was.
            Problem: 429 when too many of this tenant's are, 408 when it does not arrive in time,
                400 when the client goes away.
        """
        if self._bodies[tenant] >= self._max_tenant_bodies:
            raise Problem(
                HTTPStatus.TOO_MANY_REQUESTS,
                "rate-limited",
                "too many bodies of this tenant are on their way; send the same request later",
                retryable=True,
                headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
            )
        if self.bodies >= self._max_bodies:
            raise QueueFullError("too many bodies are on their way; send the same request later")
        self._bodies[tenant] += 1
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
                HTTPStatus.BAD_REQUEST, "body-incomplete", "the connection ended within the body"
            ) from None
        finally:
            self._bodies[tenant] -= 1
            if not self._bodies[tenant]:
                del self._bodies[tenant]
