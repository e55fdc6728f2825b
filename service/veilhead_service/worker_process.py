"""One evaluating process, as the service sees it: its socket, its memory, its end."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from veilhead_protocol.errors import WorkerError
from veilhead_service import frames
from veilhead_service.head_encryption import HeadKey
from veilhead_service.model_store import StoredModel

#: A worker imports its libraries before it answers: seconds at most.
_START_SECONDS: Final = 60.0

#: Between two looks at a worker's memory.
_MEASURE_SECONDS: Final = 0.25

#: Between the end of a process's socket and its own.
_END_SECONDS: Final = 0.05


class Worker:
    """One process and its socket.

    Attributes:
        loading: the version that it is loading now, or was when it was lost.
        asking: whether somebody waits for its answer.
        met: digests of the heads that it was given.
        evaluations: queries that it answered, or refused.
        leaving: its successor is on the way.
        succeeded: its successor is up.
        gone: set when the process has ended.
    """

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
        self.on_exit: Callable[[Worker], None] = lambda _: None
        self.gone = asyncio.Event()
        self.loading: StoredModel | None = None
        self.asking = False
        self.met: set[bytes] = set()
        self.evaluations = 0
        self.leaving = False
        self.succeeded = False
        self._warm_bytes = 0
        self._measured = time.monotonic()

    @classmethod
    async def start(
        cls, head_bytes: int, memory_bytes: int, zeros_ahead: int, head_key: HeadKey | None
    ) -> Worker:
        """A process that is up and has no heads yet.

        Args:
            head_bytes: encoded heads that it keeps.
            memory_bytes: by how much a load may let it grow.
            zeros_ahead: zeros that it encrypts ahead for each of the last keys.
            head_key: what encrypted heads are under.

        Raises:
            WorkerError: when it cannot be started, ends while starting or takes too long.
        """
        ours, theirs = socket.socketpair()
        # One thread each: the pool has a process for every core.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment.pop("VEILHEAD_SERVER_HEAD_KEY", None)  # it goes over the socket instead
        arguments = map(str, (theirs.fileno(), head_bytes, memory_bytes, zeros_ahead))
        try:
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
        except OSError as error:
            ours.close()
            raise WorkerError(
                f"an evaluating process cannot be started: {error.strerror}"
            ) from error
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
                    worker._writer.write(frames.write([frames.HEAD_KEY, head_key.data]))
                    await worker._read()
        except BaseException as error:
            how = (
                f"took longer than {_START_SECONDS:g} seconds to start"
                if isinstance(error, TimeoutError)
                else f"ended while starting ({worker.ending()}); its own message is in the log"
            )
            worker.stop()
            await worker.gone.wait()
            if isinstance(error, OSError | EOFError):
                raise WorkerError(f"an evaluating process {how}") from error
            raise
        worker.measure()
        return worker

    async def ask(
        self, model: StoredModel, request: list[bytes], *, seconds: float, load_seconds: float
    ) -> list[bytes]:
        """The worker's answer to a request about this version.

        After an error an answer may still be on its way: the worker can be asked no more.

        Args:
            model: the version.
            request: the parts of the frame.
            seconds: how long it may take, without loading the head.
            load_seconds: how long it may take to load the head, if it has to.

        Raises:
            TimeoutError: when it takes longer; `loading` says over what.
            OSError: when the worker is lost.
            EOFError: likewise.
        """
        self.asking = True
        try:
            async with asyncio.timeout(seconds) as limit:
                self._writer.write(frames.write(request))
                await self._writer.drain()
                while True:
                    answer = await self._read()
                    if answer[0] == frames.LOADING:
                        self.loading = model
                        limit.reschedule(self._loop.time() + load_seconds)
                    elif answer[0] == frames.LOADED:
                        self.loading = None
                        limit.reschedule(self._loop.time() + seconds)
                    else:
                        return answer
        finally:
            self.asking = False

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

    def measure(self) -> None:
        """Note what it holds with the heads that every worker has."""
        self._warm_bytes = self.memory_bytes()

    def has_outgrown(self, limit: int) -> bool:
        """Whether it holds more than the limit; looks at most every _MEASURE_SECONDS."""
        now = time.monotonic()
        if now - self._measured < _MEASURE_SECONDS:
            return False
        self._measured = now
        # A successor would hold as much as this one did when it was warm: replacing it for less
        # than twice of that would never end.
        return self.memory_bytes() > (limit if self._warm_bytes < limit else 2 * self._warm_bytes)

    def ending(self) -> str:
        """How the process ended, or that it has not."""
        try:
            status = self._process.wait(_END_SECONDS)  # its socket ends a moment before it does
        except subprocess.TimeoutExpired:
            return "it did not end"
        if status >= 0:
            return f"it ended with status {status}"
        try:
            return f"it was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"it was ended by signal {-status}"

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
