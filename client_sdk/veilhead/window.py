"""Chunks of rows under way: a bounded number of them, started and answered in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

from veilhead_protocol.errors import ClientError

_Row = TypeVar("_Row")
_Answer = TypeVar("_Answer")


class Window(Generic[_Row, _Answer]):
    """At most `limit` chunks at once, each a task of its own: one embeds while others wait.

    What is made of a chunk's rows once they are there takes longer for some rows than for others,
    and the service chooses them: it counts no more as under way, so that no later chunk waits for
    it. With those that nobody has taken yet there are at most twice `limit` chunks.

    The tasks belong to the window and to no scope of the caller's, so that an asynchronous
    generator may stand still between two rows, or be dropped.
    """

    def __init__(
        self, limit: int, finish: Callable[[list[_Row]], Awaitable[list[_Answer]]]
    ) -> None:
        """Make one.

        Args:
            limit: chunks under way.
            finish: makes the answers of a chunk's rows.
        """
        self._limit = limit
        self._finish = finish
        self._slots = asyncio.Semaphore(limit)
        self._tasks: deque[asyncio.Task[list[_Answer]]] = deque()
        self._ended = False

    async def start(self, work: Callable[[], Coroutine[Any, Any, list[_Row]]]) -> list[_Answer]:
        """Start a chunk; the answers of earlier ones that are there, or had to be waited for.

        Raises:
            ClientError: when the client was closed meanwhile.
        """
        answers: list[_Answer] = []
        while len(self._tasks) >= 2 * self._limit:
            answers += await self.rest()
        await self._slots.acquire()
        self._check()
        self._tasks.append(asyncio.create_task(self._chunk(work)))
        while self._tasks[0].done():
            answers += await self.rest()
        return answers

    async def _chunk(self, work: Callable[[], Coroutine[Any, Any, list[_Row]]]) -> list[_Answer]:
        try:
            rows = await work()
        finally:
            self._slots.release()
        return await self._finish(rows)

    async def rest(self) -> list[_Answer]:
        """The answers of the oldest chunk, once they are there; none when there is no chunk.

        Raises:
            ClientError: when the client was closed meanwhile.
        """
        if not self._tasks:
            return []
        # Waiting for a task itself would cancel it along with the caller.
        await asyncio.wait((self._tasks[0],))
        self._check()
        return self._tasks.popleft().result()

    async def cancel(self) -> None:
        """Stop whatever is under way."""
        self._ended = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._slots.release()  # for a `start` that waits

    def _check(self) -> None:
        if self._ended:
            raise ClientError("the client was closed while rows were under way")
