"""The evaluating processes: who is free, who has gone, who takes their place.

A worker that dies or takes too long is replaced; one that holds too much memory, or has answered
as often as it may, goes on until its successor is up. Workers that end without a single answer are
replaced ever more slowly, unless what they loaded is to blame.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar

from veilhead_protocol.errors import ServiceError, WorkerError
from veilhead_service.background import keep_running, pause_after, reason_of
from veilhead_service.head_encryption import HeadKey
from veilhead_service.line import FairLine
from veilhead_service.model_store import StoredModel
from veilhead_service.worker_process import Worker

#: Added to a time limit for every unit of a layout's cost, forty times what one takes: a head of
#: 4,096 classes may evaluate for many seconds.
COST_SECONDS: Final = 0.001

#: Pauses before a worker is started, when the ones before it were of no use.
_FIRST_PAUSE_SECONDS: Final = 0.5
_LONGEST_PAUSE_SECONDS: Final = 30.0

#: Workers that start at the same time: each reads its libraries and takes a core for a second.
_STARTS_AT_ONCE: Final = 16

#: What a load takes for a moment, beyond what a worker may hold: encoding and self-test.
_LOADING_BYTES: Final = 2**28

#: How long killed processes may take to be gone.
_GONE_SECONDS: Final = 5.0

_Result = TypeVar("_Result")

logger = logging.getLogger("veilhead.service")


class Reason(StrEnum):
    """Why a worker was replaced."""

    DIED = "died"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    MEMORY = "memory"
    EVALUATIONS = "evaluations"


@dataclass(frozen=True)
class WorkerLimits:
    """What a worker may take.

    Attributes:
        memory_bytes: resident memory above which it is replaced.
        head_bytes: encoded heads that it keeps.
        zeros_ahead: zeros that it encrypts ahead for each of the last keys.
        load_seconds: for the loading of a head.
        evaluations: answers after which it is replaced; None for no limit.
    """

    memory_bytes: int = 2 * 2**30
    head_bytes: int = 2**30
    zeros_ahead: int = 16
    load_seconds: float = 60.0
    evaluations: int | None = None


class Staff:
    """A fixed number of workers, and the line of those who want one.

    Attributes:
        line: who waits for a worker.
        alive: workers that are up.
        free: those of them that do nothing; the one that answered last is the last.
        fresh: those of them that load ahead and answer nothing yet.
        restarts: workers that were replaced, by reason.
        failed_starts: workers that did not come up.
        useless: workers in a row that answered nothing.
        prepare: lets a fresh worker load ahead.
        blame: is told which version a worker was loading when it was lost, and how it ended.
    """

    def __init__(
        self, line: FairLine[Worker], limits: WorkerLimits, head_key: HeadKey | None
    ) -> None:
        """Nobody is there yet: `add` starts a worker."""
        self.line = line
        self.alive: set[Worker] = set()
        self.free: list[Worker] = []
        self.fresh: set[Worker] = set()
        self.restarts: Counter[Reason] = Counter()
        self.failed_starts = 0
        self.useless = 0
        self.prepare: Callable[[Worker], Awaitable[None]]
        self.blame: Callable[[StoredModel, str], None]
        self._limits = limits
        self._head_key = head_key
        self._starts = asyncio.Semaphore(_STARTS_AT_ONCE)
        self._leftover: set[Worker] = set()  # killed, and not gone yet
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopped = False

    async def stop(self) -> None:
        """End every worker and what runs in the background; who waits gets a WorkerError."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in list(self.alive):
            self.dismiss(worker)
        self.line.fail_all(stopping())
        try:
            async with asyncio.timeout(_GONE_SECONDS):
                for worker in list(self._leftover):
                    await worker.gone.wait()
        except TimeoutError:
            logger.error("a killed worker is still there after %g seconds", _GONE_SECONDS)

    def spawn(self, name: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Do work in the background until it returns, however often it fails."""
        return self.spawn_once(keep_running(name, work))

    def spawn_once(self, work: Coroutine[Any, Any, _Result]) -> asyncio.Task[_Result]:
        """Do work in the background that deals with its own exceptions."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- work -------------------------------------------------------------------------------------

    def refuse_when_stopped(self) -> None:
        """Raise WorkerError once everything stops."""
        if self._stopped:
            raise stopping()

    async def take(self, model: StoredModel, tenant: str, cost: int) -> Worker:
        """A worker that is free, at once or when this tenant's turn comes; `release` gives it back.

        Raises:
            WorkerError: when everything stops.
        """
        self.refuse_when_stopped()
        if self.free:
            return self.choose(model)
        future = self.line.join(tenant, cost)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.release(future.result())
            raise

    def choose(self, model: StoredModel) -> Worker:
        """One of those that are free now: one that holds the head, if any does."""
        # The one that answered last has the warmest caches.
        digest = model.manifest.digest
        choice = next((one for one in reversed(self.free) if digest in one.met), self.free[-1])
        self.free.remove(choice)
        return choice

    def release(self, worker: Worker) -> None:
        """Give a worker to the next in the line, or put it to the free; nothing when it is lost."""
        if worker not in self.alive:
            return
        if worker.succeeded:
            self.dismiss(worker)
            return
        future = self.line.next()
        if future is None:
            self.free.append(worker)
        else:
            future.set_result(worker)

    async def ask(
        self, worker: Worker, model: StoredModel, request: list[bytes], seconds: float
    ) -> list[bytes]:
        """A worker's answer; one that is lost over it is replaced.

        Raises:
            WorkerError: when it was lost.
        """
        try:
            return await worker.ask(
                model, request, seconds=seconds, load_seconds=self.seconds_to_load(model)
            )
        except BaseException as error:
            # Whatever happened, an answer may still be on the socket: this worker is done.
            if isinstance(error, TimeoutError):
                self._replace(worker, Reason.TIMEOUT)
            elif isinstance(error, OSError | EOFError):
                self._replace(worker, Reason.DIED)
            else:
                self._replace(worker, Reason.CANCELLED)
                raise
            raise WorkerError(
                "the evaluating process was lost; send the same query again"
            ) from error

    def seconds_to_load(self, model: StoredModel) -> float:
        """How long the loading of this version may take."""
        return self._limits.load_seconds + model.manifest.layout.cost * COST_SECONDS

    def evaluated(self, worker: Worker) -> None:
        """Give a worker back that has answered a query."""
        self.useless = 0
        worker.evaluations += 1
        most = self._limits.evaluations
        if most is not None and worker.evaluations >= most:
            self._succeed(worker, Reason.EVALUATIONS)
        elif worker.has_outgrown(self._limits.memory_bytes):
            self._succeed(worker, Reason.MEMORY)
        self.release(worker)

    # --- coming and going -------------------------------------------------------------------------

    async def start_worker(self) -> Worker:
        """A process that belongs to nobody yet.

        Raises:
            WorkerError: when it does not come up.
        """
        growth = self._limits.memory_bytes + _LOADING_BYTES
        async with self._starts:
            return await Worker.start(
                self._limits.head_bytes, growth, self._limits.zeros_ahead, self._head_key
            )

    async def start_apart(self) -> Worker:
        """A process that serves no query, and ends with everything else, or with its `stop`.

        Raises:
            WorkerError: when it does not come up.
        """
        worker = await self.start_worker()
        self._leftover.add(worker)
        worker.on_exit = self._leftover.discard
        return worker

    async def add(self) -> bool:
        """Add a worker; whether it answers queries now.

        Raises:
            WorkerError: when it does not come up.
        """
        worker = await self.start_worker()
        if self._stopped:
            worker.stop()
            await worker.gone.wait()
            return False
        self.alive.add(worker)
        self.fresh.add(worker)
        worker.on_exit = self._on_exit
        if worker.gone.is_set():
            self._on_exit(worker)
        else:
            await self.prepare(worker)
        if worker not in self.alive:
            return False
        self.fresh.discard(worker)
        self.release(worker)
        return True

    async def add_at_last(self) -> None:
        """Add a worker, however often that fails; a crash loop does not spin."""
        while not self._stopped:
            if self.useless > 1:
                pause = pause_after(self.useless - 1, _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
                logger.error("the next worker starts in %g seconds: the last ones failed", pause)
                await asyncio.sleep(pause)
            try:
                if await self.add():
                    return
            except ServiceError as error:
                self.useless += 1
                self.failed_starts += 1
                logger.error("a worker could not be started: %s", reason_of(error))

    def _on_exit(self, worker: Worker) -> None:
        self._leftover.discard(worker)
        if not worker.asking:  # else whoever asks learns of it, and what it was doing
            self._replace(worker, Reason.DIED)

    def _replace(self, lost: Worker, reason: Reason) -> None:
        """Kill a worker, if it is not dead, and start another; once for each worker."""
        if lost not in self.alive:
            return
        is_fresh = lost in self.fresh
        how = self.how_it_ended(lost, reason)
        self.dismiss(lost)
        if self._stopped:
            return
        if lost.loading is not None and reason is not Reason.CANCELLED:
            self.blame(lost.loading, how)
        elif lost.evaluations == 0:
            self.useless += 1
        if lost.leaving:
            return
        self.restarts[reason] += 1
        logger.warning("a worker is replaced: %s", reason)
        if not is_fresh:  # else `add_at_last` is about to add another
            self.spawn("starting a worker", self.add_at_last)

    def how_it_ended(self, lost: Worker, reason: Reason) -> str:
        """What is said of a worker that was lost."""
        if reason is Reason.DIED:
            return lost.ending()
        if reason is Reason.TIMEOUT and lost.loading is not None:
            return f"it took longer than {self.seconds_to_load(lost.loading):g} seconds"
        return str(reason)

    def _succeed(self, worker: Worker, reason: Reason) -> None:
        """Start a successor, and end the worker when it is up and the worker is free."""

        async def succeed() -> None:
            await self.add_at_last()
            worker.succeeded = True
            if worker in self.free:
                self.dismiss(worker)

        if worker.leaving or self._stopped:
            return
        worker.leaving = True
        self.restarts[reason] += 1
        logger.info("a worker is replaced: %s", reason)
        self.spawn("starting a worker", succeed)

    def dismiss(self, worker: Worker) -> None:
        """End a worker."""
        self.alive.discard(worker)
        self.fresh.discard(worker)
        if worker in self.free:
            self.free.remove(worker)
        if not worker.gone.is_set():
            self._leftover.add(worker)
        worker.stop()


def stopping() -> WorkerError:
    """What everybody gets who waits when everything stops."""
    return WorkerError("the service is stopping; send the same query again later")
