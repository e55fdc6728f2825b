"""The pool of evaluating processes.

SEAL's binding holds the interpreter's lock throughout, so evaluation runs in processes. Each has
a socket of its own and holds one query at a time. A worker that dies or takes too long costs only
that query, which is answered as retryable, and another takes its place.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from typing import Final

from veilhead_protocol import errors
from veilhead_protocol.errors import ServiceError, WireError, WorkerError
from veilhead_service import frames
from veilhead_service.model_store import StoredModel

#: A worker imports its libraries before it answers: seconds at most.
_START_SECONDS: Final = 60.0

logger = logging.getLogger("veilhead.service")


@dataclass(frozen=True)
class Evaluation:
    """A reply's bytes, and the seconds that a worker spent on it, from bytes to bytes."""

    reply: bytes
    seconds: float


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

    @classmethod
    async def start(cls) -> _Worker:
        ours, theirs = socket.socketpair()
        # One thread each: the pool has a process for every core.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "veilhead_service.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                # An interrupt at the terminal is for the service, which then ends its workers.
                start_new_session=True,
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = cls(process, reader, writer)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await worker._read()
        except BaseException as error:
            worker.stop()
            if isinstance(error, OSError | EOFError):
                raise WorkerError(
                    "an evaluating process ended while starting; its own message is in the log"
                ) from error
            raise
        return worker

    async def ask(self, request: list[bytes]) -> list[bytes]:
        self._writer.write(frames.write(request))
        await self._writer.drain()
        return await self._read()

    async def _read(self) -> list[bytes]:
        (count,) = frames.COUNT.unpack(await self._reader.readexactly(frames.COUNT.size))
        lengths = frames.LENGTH.iter_unpack(
            await self._reader.readexactly(frames.LENGTH.size * count)
        )
        return [await self._reader.readexactly(length) for (length,) in lengths]

    def stop(self) -> None:
        self._writer.close()
        self._process.kill()
        self._process.wait()  # a killed process ends at once, and threads may be gone at exit


def _stopping() -> WorkerError:
    return WorkerError("the service is stopping; send the same query again later")


class WorkerPool:
    """A fixed number of workers, and a bounded line of queries that wait for them."""

    def __init__(self, workers: int, *, waiting_per_worker: int, evaluation_seconds: float) -> None:
        self._size = workers
        self._max_waiting = workers * waiting_per_worker
        self._evaluation_seconds = evaluation_seconds
        self._free: asyncio.Queue[_Worker | None] = asyncio.Queue()  # None: the pool has stopped
        self._alive: set[_Worker] = set()
        self._replacements: set[asyncio.Task[None]] = set()
        self._waiting = 0
        self._stopped = False

    async def start(self) -> None:
        """Start every worker.

        Raises:
            WorkerError: when one does not come up.
        """
        await asyncio.gather(*(self._add() for _ in range(self._size)))

    async def stop(self) -> None:
        """End every worker. Queries that run or wait are answered as retryable."""
        self._stopped = True
        for task in self._replacements:
            task.cancel()
        await asyncio.gather(*self._replacements, return_exceptions=True)
        for worker in self._alive:
            worker.stop()
        self._alive.clear()
        for _ in range(self._waiting):
            self._free.put_nowait(None)

    @property
    def ready(self) -> bool:
        """Whether any worker is up."""
        return bool(self._alive)

    async def evaluate(
        self, model: StoredModel, key_id: bytes, key: bytes, query: bytes
    ) -> Evaluation:
        """The reply to a query.

        Raises:
            WireError: one of its kinds, when the head refuses the query.
            WorkerError: when the line is full, the worker was lost or the pool has stopped; the
                same query may be sent again.
            ServiceError: when the evaluation failed for a reason of the service's own.
        """
        request = [
            frames.EVALUATE,
            model.manifest.digest,
            os.fsencode(model.directory),
            key_id,
            key,
            query,
        ]
        kind, *rest = await self._ask(request)
        if kind == frames.REPLY:
            return Evaluation(rest[0], struct.unpack("<d", rest[1])[0])
        if kind == frames.REFUSED:
            name, message = json.loads(rest[0])
            refusal: type[WireError] = getattr(errors, name)
            raise refusal(message)
        raise ServiceError("the evaluation failed; the worker's log names the kind of error")

    async def _ask(self, request: list[bytes]) -> list[bytes]:
        if self._stopped:
            raise _stopping()
        if self._waiting >= self._max_waiting:
            raise WorkerError("too many queries are waiting; send the same query again later")
        self._waiting += 1
        try:
            worker = await self._free.get()
        finally:
            self._waiting -= 1
        if worker is None:
            raise _stopping()
        try:
            async with asyncio.timeout(self._evaluation_seconds):
                answer = await worker.ask(request)
        except BaseException as error:
            # Whatever happened, an answer may still be on the socket: this worker is done.
            self._replace(worker)
            if isinstance(error, OSError | EOFError | TimeoutError):
                raise WorkerError(
                    "the evaluating process was lost; send the same query again"
                ) from error
            raise
        self._free.put_nowait(worker)
        return answer

    async def _add(self) -> None:
        worker = await _Worker.start()
        if self._stopped:
            worker.stop()
            return
        self._alive.add(worker)
        self._free.put_nowait(worker)

    def _replace(self, lost: _Worker) -> None:
        async def replace() -> None:
            while True:
                try:
                    await self._add()
                except (OSError, ServiceError) as error:
                    logger.error("a worker could not be started: %s", error)
                    await asyncio.sleep(1)
                else:
                    return

        self._alive.discard(lost)
        lost.stop()
        if self._stopped:
            return
        task = asyncio.get_running_loop().create_task(replace())
        self._replacements.add(task)
        task.add_done_callback(self._replacements.discard)
