"""Chunks of rows under way: a bounded number of them, started and answered in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from veilhead_protocol.errors import ClientError

_Row = TypeVar("_Row")


class Window(Generic[_Row]):
    """At most `limit` chunks at once, each a task of its own: one embeds while others wait.

    The tasks belong to the window and to no scope of the caller's, so that an asynchronous
    generator may stand still between two rows, or be dropped.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tasks: deque[asyncio.Task[list[_Row]]] = deque()

    async def start(self, work: Callable[[], Coroutine[Any, Any, list[_Row]]]) -> list[_Row]:
        """Start a chunk; the rows of earlier ones that are answered, or had to be waited for."""
        rows: list[_Row] = []
        while self._tasks and (len(self._tasks) >= self._limit or self._tasks[0].done()):
            rows += await self.rest()
        self._tasks.append(asyncio.create_task(work()))
        return rows

    async def rest(self) -> list[_Row]:
        """The rows of the oldest chunk, once they are there; none when no chunk is under way.

        Raises:
            ClientError: when the client was closed meanwhile.
        """
        if not self._tasks:
            return []
        # Waiting for a task itself would cancel it along with the caller.
        await asyncio.wait((self._tasks[0],))
        task = self._tasks.popleft()
        if task.cancelled():
            raise ClientError("the client was closed while rows were under way")
        return task.result()

    async def cancel(self) -> None:
        """Stop whatever is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
