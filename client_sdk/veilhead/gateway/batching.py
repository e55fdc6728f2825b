"""Texts of one caller -> batches, and answers back to each of its requests.

Every caller has a batcher of its own: what a caller learns of its answers tells of the key that
they were under, and no text of another caller may be under the same one.

A batch is sent when it is full, or when its first text has waited long enough, or later when as
many batches as may be are on their way already: it then goes on growing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veilhead_protocol.errors import GatewayClosedError, GatewayFullError, VeilheadError

#: Batches under way at once: one is embedded while others are on the wire.
BATCHES_IN_FLIGHT: Final = 4

Logits = NDArray[np.float64]  # [C]
Outcome = Logits | VeilheadError


@dataclass
class _Waiting:
    """One text, and where its answer goes."""

    text: str = field(repr=False)
    answer: asyncio.Future[Outcome]
    since: float


class Batcher:
    """Puts texts together that arrive together. It belongs to one event loop."""

    def __init__(
        self,
        answer: Callable[[list[str]], Awaitable[Sequence[Outcome]]],
        *,
        max_batch: int,
        max_wait_seconds: float,
        max_waiting: int,
        on_batch: Callable[[int, float], None],
        slots: asyncio.Semaphore | None = None,
    ) -> None:
        """Make one; `run` makes it work.

        Args:
            answer: an outcome for each text of a batch.
            max_batch: texts in one batch.
            max_wait_seconds: how long a text waits for others.
            max_waiting: texts that may wait, beyond which callers are refused.
            on_batch: called with each batch's size and the seconds that its first text has waited.
            slots: what limits batches on their way, in the order in which they ask; it may be
                shared with other batchers.
        """
        self._answer = answer
        self._max_batch = max_batch
        self._max_wait_seconds = max_wait_seconds
        self._max_waiting = max_waiting
        self._on_batch = on_batch
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._slots = slots or asyncio.Semaphore(BATCHES_IN_FLIGHT)
        self._closed = False

    @property
    def waiting(self) -> int:
        """Texts that are in no batch yet."""
        return len(self._waiting)

    async def ask(self, texts: Sequence[str]) -> list[Outcome]:
        """An outcome for each text.

        Raises:
            GatewayFullError: when too many texts wait already; none of these is kept.
            GatewayClosedError: when the gateway is about to stop.
        """
        if self._closed:
            raise GatewayClosedError("the gateway is about to stop")
        if len(self._waiting) + len(texts) > self._max_waiting:
            raise GatewayFullError(
                f"{len(self._waiting)} texts wait already, of at most {self._max_waiting}"
            )
        loop, now = asyncio.get_running_loop(), time.monotonic()
        mine = [_Waiting(text, loop.create_future(), now) for text in texts]
        self._waiting += mine
        self._arrived.set()
        try:
            return [await item.answer for item in mine]
        finally:
            # Of a caller that has gone: what is not in a batch yet is not sent.
            for item in mine:
                item.answer.cancel()

    async def run(self) -> None:
        """Make batches until this is cancelled; batches on their way are then finished."""
        async with asyncio.TaskGroup() as batches:
            with suppress(asyncio.CancelledError):
                while True:
                    await self._until_due()
                    await self._slots.acquire()  # the batch goes on growing meanwhile
                    batch = self._next_batch()
                    if not batch:
                        self._slots.release()
                        continue
                    self._on_batch(len(batch), time.monotonic() - batch[0].since)
                    batches.create_task(self._send(batch))
            self._close()

    async def _until_due(self) -> None:
        """Wait until a batch is full, or its first text has waited long enough."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        due = self._waiting[0].since + self._max_wait_seconds
        with suppress(TimeoutError):
            async with asyncio.timeout(due - time.monotonic()):
                while len(self._waiting) < self._max_batch:
                    self._arrived.clear()
                    await self._arrived.wait()

    def _next_batch(self) -> list[_Waiting]:
        """The texts that wait, but for those of requests that have gone; at most a batch."""
        batch: list[_Waiting] = []
        while self._waiting and len(batch) < self._max_batch:
            item = self._waiting.popleft()
            if not item.answer.done():
                batch.append(item)
        return batch

    async def _send(self, batch: list[_Waiting]) -> None:
        try:
            outcomes = await self._answer([item.text for item in batch])
        except VeilheadError as error:
            outcomes = [error] * len(batch)
        except Exception as error:
            # Whatever it is, its message may hold text.
            failure = VeilheadError(f"the batch failed with {type(error).__name__}")
            outcomes = [failure] * len(batch)
        finally:
            self._slots.release()
        for item, outcome in zip(batch, outcomes, strict=True):
            if not item.answer.done():
                item.answer.set_result(outcome)

    def _close(self) -> None:
        self._closed = True
        for item in self._waiting:
            if not item.answer.done():
                item.answer.set_result(GatewayClosedError("the gateway is about to stop"))
        self._waiting.clear()
