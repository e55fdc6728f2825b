"""The pool of evaluating processes, and their supervision.

SEAL's binding holds the interpreter's lock throughout, so evaluation runs in processes. Each has
a socket of its own and holds one query at a time. A worker that dies or takes too long costs only
that query, which is answered as retryable, and another takes its place. One that holds too much
memory, or has answered as often as it may, goes on until its successor is up.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from veilhead_protocol import errors
from veilhead_protocol.errors import (
    DrainingError,
    ModelRetiredError,
    ModelUnavailableError,
    QueueFullError,
    ServiceError,
    StoreError,
    WireError,
    WorkerError,
)
from veilhead_protocol.layout import Layout
from veilhead_service import frames
from veilhead_service.head_encryption import HeadKey
from veilhead_service.model_store import ModelSource, StoredModel

#: A worker imports its libraries before it answers: seconds at most.
_START_SECONDS: Final = 60.0

#: Added to the time limit for every unit of a layout's cost, forty times what one takes: a head of
#: 4,096 classes may evaluate for many seconds.
_COST_SECONDS: Final = 0.001

#: Pauses before a worker is started, when the ones before it were of no use.
_FIRST_PAUSE_SECONDS: Final = 0.5
_LONGEST_PAUSE_SECONDS: Final = 30.0

#: Between two looks at the store for versions that the workers do not hold yet.
_WARM_SECONDS: Final = 2.0

#: Between two looks at a worker's memory.
_MEASURE_SECONDS: Final = 0.25

#: How long killed processes may take to be gone.
_GONE_SECONDS: Final = 5.0

logger = logging.getLogger("veilhead.service")


class Reason(StrEnum):
    """Why a worker was replaced."""

    DIED = "died"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    MEMORY = "memory"
    EVALUATIONS = "evaluations"


@dataclass(frozen=True)
class Evaluation:
    """A reply's bytes, and what they took.

    Attributes:
        reply: the reply message.
        seconds: in the worker, from bytes to bytes.
        queue_seconds: until a worker was free.
    """

    reply: bytes
    seconds: float
    queue_seconds: float = 0.0


@dataclass(frozen=True)
class PoolStats:
    """What the pool does at the moment, and has done since it was made.

    Attributes:
        alive: workers that are up.
        busy: those of them that evaluate, or load a head.
        waiting: queries that wait for a worker.
        evaluations: queries that were answered, or refused by the head.
        restarts: workers that were replaced, by reason; every reason is there.
        failed_starts: workers that did not come up.
    """

    alive: int
    busy: int
    waiting: int
    evaluations: int
    restarts: Mapping[Reason, int]
    failed_starts: int


def current_models(source: ModelSource) -> list[StoredModel]:
    """The current version of every model that can be read; the log names the others."""
    found = []
    for name in source.names():
        try:
            model = source.current(name)
        except ModelRetiredError:
            continue
        except StoreError as error:
            logger.error("the model %s cannot be loaded: %s", name, error)
            continue
        if model is not None:
            found.append(model)
    return found


class _Worker:
    """One process and its socket."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._exit = os.pidfd_open(process.pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._exit, self._reap)
        self.on_exit: Callable[[_Worker], None] = lambda _: None
        self.gone = asyncio.Event()
        self.met: set[bytes] = set()  # digests of the heads that it was given
        self.evaluations = 0
        self.leaving = False  # its successor is on the way
        self.succeeded = False  # and is up
        self._warm_bytes = 0
        self._measured = time.monotonic()

    @classmethod
    async def start(
        cls,
        head_bytes: int,
        zeros_ahead: int,
        models: Iterable[StoredModel],
        head_key: HeadKey | None,
    ) -> _Worker:
        ours, theirs = socket.socketpair()
        # One thread each: the pool has a process for every core.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment.pop("VEILHEAD_SERVER_HEAD_KEY", None)  # it goes over the socket instead
        arguments = map(str, (theirs.fileno(), head_bytes, zeros_ahead))
        with theirs:
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "veilhead_service.worker", *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                # An interrupt at the terminal is for the service, which then ends its workers.
                start_new_session=True,
            )
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            process.kill()
            process.wait()
            raise
        worker = cls(process, reader, writer)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await worker._read()
                if head_key is not None:
                    await worker.ask([frames.HEAD_KEY, head_key.data])
            for model in models:
                await worker.load(model)
        except BaseException as error:
            worker.stop()
            await worker.gone.wait()
            if isinstance(error, OSError | EOFError):
                raise WorkerError(
                    "an evaluating process ended while starting; its own message is in the log"
                ) from error
            raise
        worker._warm_bytes = worker.memory_bytes()
        return worker

    async def ask(self, request: list[bytes]) -> list[bytes]:
        self._writer.write(frames.write(request))
        await self._writer.drain()
        return await self._read()

    async def load(self, model: StoredModel) -> None:
        """Let the worker load a head; one that cannot be loaded is in its log.

        Raises:
            TimeoutError: when it takes too long.
        """
        self.met.add(model.manifest.digest)
        request = [frames.LOAD, model.manifest.digest, os.fsencode(model.directory)]
        seconds = _START_SECONDS + model.manifest.layout.cost * _COST_SECONDS
        async with asyncio.timeout(seconds):
            kind, *_ = await self.ask(request)
        if kind != frames.READY:
            logger.error("the model %s cannot be loaded by a worker", model.manifest.name)

    async def _read(self) -> list[bytes]:
        header = await self._reader.readexactly(frames.HEADER.size)
        count, size = frames.HEADER.unpack(header)
        return frames.read(count, await self._reader.readexactly(size))

    def memory_bytes(self) -> int:
        """Resident memory, proc(5); 0 when the process is gone."""
        try:
            pages = Path(f"/proc/{self._process.pid}/statm").read_text("ascii").split()[1]
        except (OSError, IndexError):
            return 0
        return int(pages) * resource.getpagesize()

    def has_outgrown(self, limit: int) -> bool:
        """Whether it holds more than the limit; looks at most every _MEASURE_SECONDS."""
        now = time.monotonic()
        if now - self._measured < _MEASURE_SECONDS:
            return False
        self._measured = now
        # A successor would hold as much as this one did when it was warm: replacing it for less
        # than twice of that would never end.
        return self.memory_bytes() > (limit if self._warm_bytes < limit else 2 * self._warm_bytes)

    def stop(self) -> None:
        """Kill the process; the kernel says when it is gone, and nobody waits for it here."""
        self._writer.close()
        if not self.gone.is_set():
            self._process.kill()

    def _reap(self) -> None:
        self._loop.remove_reader(self._exit)
        os.close(self._exit)
        self._process.wait()  # it has ended
        self.gone.set()
        self.on_exit(self)


class WorkerPool:
    """A fixed number of workers, and a bounded line of queries that wait for them."""

    def __init__(
        self,
        workers: int,
        *,
        waiting_per_worker: int,
        evaluation_seconds: float,
        queue_seconds: float = 20.0,
        memory_bytes: int = 2 * 2**30,
        head_bytes: int = 2**30,
        zeros_ahead: int = 16,
        max_evaluations: int | None = None,
        preload: Callable[[], Iterable[StoredModel]] = list,
        head_key: HeadKey | None = None,
    ) -> None:
        """Make a pool; `start` starts its processes.

        Args:
            workers: evaluating processes.
            waiting_per_worker: queries that may wait for each of them.
            evaluation_seconds: an evaluation that takes longer ends with its worker.
            queue_seconds: how long a query waits for a worker.
            memory_bytes: resident memory above which a worker is replaced.
            head_bytes: encoded heads that a worker keeps.
            zeros_ahead: zeros that a worker encrypts ahead for each of the keys that asked last.
            max_evaluations: answers after which a worker is replaced.
            preload: the versions that every worker loads before it is asked for them.
            head_key: what encrypted heads are under.
        """
        self._head_key = head_key
        self._size = workers
        self._max_waiting = workers * waiting_per_worker
        self._evaluation_seconds = evaluation_seconds
        self._queue_seconds = queue_seconds
        self._memory_bytes = memory_bytes
        self._head_bytes = head_bytes
        self._zeros_ahead = zeros_ahead
        self._max_evaluations = max_evaluations
        self._preload = preload
        self._free: list[_Worker] = []
        self._line: deque[asyncio.Future[_Worker]] = deque()
        self._alive: set[_Worker] = set()
        self._leftover: set[_Worker] = set()  # killed, and not gone yet
        self._tasks: set[asyncio.Task[None]] = set()
        self._useless = 0  # workers in a row that answered nothing
        self._draining = False
        self._stopped = False
        self._evaluations = 0
        self._restarts: Counter[Reason] = Counter()
        self._failed_starts = 0

    async def start(self) -> None:
        """Start every worker.

        Raises:
            WorkerError: when one does not come up.
        """
        added = await asyncio.gather(
            *(self._add() for _ in range(self._size)), return_exceptions=True
        )
        for result in added:
            if result is not None:
                raise result
        self._spawn(self._keep_warm())

    async def stop(self) -> None:
        """End every worker. Queries that run or wait are answered as retryable."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in list(self._alive):
            self._dismiss(worker)
        for future in self._line:
            if not future.done():
                future.set_exception(_stopping())
        self._line.clear()
        try:
            async with asyncio.timeout(_GONE_SECONDS):
                for worker in list(self._leftover):
                    await worker.gone.wait()
        except TimeoutError:
            logger.error("a killed worker is still there after %g seconds", _GONE_SECONDS)

    def drain(self) -> None:
        """Take no new queries from now on; those that are here are answered."""
        self._draining = True

    @property
    def ready(self) -> bool:
        """Whether any worker is up, and new queries are taken."""
        return bool(self._alive) and not self._draining

    def stats(self) -> PoolStats:
        """The pool's figures at this moment."""
        return PoolStats(
            alive=len(self._alive),
            busy=len(self._alive) - len(self._free),
            waiting=self._waiting,
            evaluations=self._evaluations,
            restarts={reason: self._restarts[reason] for reason in Reason},
            failed_starts=self._failed_starts,
        )

    @property
    def _waiting(self) -> int:
        return sum(not future.done() for future in self._line)

    def admit(self) -> None:
        """Refuse a new query now, before its body is read, if it is to be refused at all.

        Raises:
            DrainingError: when the service is about to stop.
            QueueFullError: when too many queries are waiting.
        """
        if self._draining:
            raise DrainingError("the service is about to stop; send the same query again later")
        self._check_line()

    def _check_line(self) -> None:
        if self._stopped:
            raise _stopping()
        if not self._free and self._waiting >= self._max_waiting:
            raise QueueFullError("too many queries are waiting; send the same query again later")

    async def evaluate(
        self,
        model: StoredModel,
        key_id: bytes,
        key: bytes,
        query: bytes,
        *,
        layout: Layout | None = None,
    ) -> Evaluation:
        """The reply to a query, which is in this layout, or a query of one text.

        Raises:
            WireError: one of its kinds, when the head refuses the query.
            ModelUnavailableError: when the head cannot be loaded or failed its self-test.
            QueueFullError: when too many queries are waiting.
            WorkerError: when no worker was free in time, the worker was lost or the pool has
                stopped; the same query may be sent again, as after QueueFullError.
            ServiceError: when the evaluation failed for a reason of the service's own.
        """
        digest = model.manifest.digest
        request = [frames.EVALUATE, digest, os.fsencode(model.directory), key_id, key, query]
        arrived = time.perf_counter()
        try:
            async with asyncio.timeout(self._queue_seconds):
                worker = await self._take(digest)
        except TimeoutError:
            raise WorkerError(
                "no evaluating process was free in time; send the same query again later"
            ) from None
        queue_seconds = time.perf_counter() - arrived
        worker.met.add(digest)
        kind, *rest = await self._ask(worker, request, (layout or model.manifest.layout).cost)
        if kind == frames.REPLY:
            return Evaluation(rest[0], struct.unpack("<d", rest[1])[0], queue_seconds)
        if kind == frames.REFUSED:
            name, message = json.loads(rest[0])
            refusal: type[WireError | ModelUnavailableError] = getattr(errors, name)
            raise refusal(message)
        raise ServiceError("the evaluation failed; the worker's log names the kind of error")

    async def _take(self, digest: bytes) -> _Worker:
        """A free worker, the sooner the longer a query has waited."""
        self._check_line()
        if self._free:
            # The one that answered last has the warmest caches.
            choice = next((one for one in reversed(self._free) if digest in one.met), None)
            if choice is None:
                choice = self._free[-1]
            self._free.remove(choice)
            return choice
        future: asyncio.Future[_Worker] = asyncio.get_running_loop().create_future()
        self._line.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._release(future.result())
            raise

    def _release(self, worker: _Worker) -> None:
        """Give a worker to the next query, or put it to the free ones."""
        if worker not in self._alive:
            return
        if worker.succeeded:
            self._dismiss(worker)
            return
        while self._line:
            future = self._line.popleft()
            if not future.done():
                future.set_result(worker)
                return
        self._free.append(worker)

    async def _ask(self, worker: _Worker, request: list[bytes], cost: int) -> list[bytes]:
        try:
            async with asyncio.timeout(self._evaluation_seconds + cost * _COST_SECONDS):
                answer = await worker.ask(request)
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
        self._useless = 0
        self._evaluations += 1
        worker.evaluations += 1
        if self._max_evaluations is not None and worker.evaluations >= self._max_evaluations:
            self._succeed(worker, Reason.EVALUATIONS)
        elif worker.has_outgrown(self._memory_bytes):
            self._succeed(worker, Reason.MEMORY)
        self._release(worker)
        return answer

    async def _add(self) -> None:
        worker = await _Worker.start(
            self._head_bytes, self._zeros_ahead, self._preload(), self._head_key
        )
        if self._stopped:
            worker.stop()
            await worker.gone.wait()
            return
        self._alive.add(worker)
        worker.on_exit = self._on_exit
        if worker.gone.is_set():
            self._on_exit(worker)
        else:
            self._release(worker)

    async def _add_at_last(self) -> None:
        """Add a worker, however often that fails; a crash loop does not spin."""
        while True:
            if self._useless > 1:
                pause = min(
                    _FIRST_PAUSE_SECONDS * 2 ** min(self._useless - 2, 10), _LONGEST_PAUSE_SECONDS
                )
                logger.error("the next worker starts in %g seconds: the last ones failed", pause)
                await asyncio.sleep(pause)
            try:
                await self._add()
            except (OSError, ServiceError) as error:
                self._useless += 1
                self._failed_starts += 1
                logger.error("a worker could not be started: %s", error)
            else:
                return

    def _on_exit(self, worker: _Worker) -> None:
        self._leftover.discard(worker)
        self._replace(worker, Reason.DIED)

    def _replace(self, lost: _Worker, reason: Reason) -> None:
        """Kill a worker, if it is not dead, and start another; once for each worker."""
        if lost not in self._alive:
            return
        self._dismiss(lost)
        if self._stopped or lost.leaving:
            return
        if lost.evaluations == 0:
            self._useless += 1
        self._restarts[reason] += 1
        logger.warning("a worker is replaced: %s", reason)
        self._spawn(self._add_at_last())

    def _succeed(self, worker: _Worker, reason: Reason) -> None:
        """Start a successor, and end the worker when it is up and the worker is free."""

        async def succeed() -> None:
            await self._add_at_last()
            worker.succeeded = True
            if worker in self._free:
                self._dismiss(worker)

        if worker.leaving or self._stopped:
            return
        worker.leaving = True
        self._restarts[reason] += 1
        logger.info("a worker is replaced: %s", reason)
        self._spawn(succeed())

    def _dismiss(self, worker: _Worker) -> None:
        self._alive.discard(worker)
        if worker in self._free:
            self._free.remove(worker)
        if not worker.gone.is_set():
            self._leftover.add(worker)
        worker.stop()

    async def _keep_warm(self) -> None:
        """Let free workers load what was published since they started."""
        while True:
            await asyncio.sleep(_WARM_SECONDS)
            for model in list(self._preload()):
                for worker in list(self._free):
                    if worker in self._free and model.manifest.digest not in worker.met:
                        self._free.remove(worker)
                        await self._warm(worker, model)

    async def _warm(self, worker: _Worker, model: StoredModel) -> None:
        try:
            await worker.load(model)
        except TimeoutError:
            self._replace(worker, Reason.TIMEOUT)
        except (OSError, EOFError):
            self._replace(worker, Reason.DIED)
        else:
            self._release(worker)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _stopping() -> WorkerError:
    return WorkerError("the service is stopping; send the same query again later")
