"""Bodies on their way in: so many at once, and each within its time.

A client that sends slowly holds a place here and none in the line before the workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from starlette.requests import ClientDisconnect

from veilhead_protocol.errors import QueueFullError
from veilhead_service.problems import Problem


class Intake:
    """Counts and times the bodies that are being read."""

    def __init__(self, *, max_bodies: int, body_seconds: float) -> None:
        self._max_bodies = max_bodies
        self._body_seconds = body_seconds
        self._bodies = 0

    @property
    def bodies(self) -> int:
        """Bodies that are on their way now."""
        return self._bodies

    @asynccontextmanager
    async def body(self) -> AsyncIterator[None]:
        """Read one body in this block.

        Raises:
            QueueFullError: when too many are being read already; nothing of this one was.
            Problem: 408 when it does not arrive in time, 400 when the client goes away.
        """
        if self._bodies >= self._max_bodies:
            raise QueueFullError("too many bodies are on their way; send the same request later")
        self._bodies += 1
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
            self._bodies -= 1
