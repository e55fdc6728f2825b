"""The pool of evaluating processes: queries in, replies out.

SEAL's binding holds the interpreter's lock throughout, so evaluation runs in processes. Each has
a socket of its own and holds one query at a time. A worker that dies or takes too long costs only
that query, which is answered as retryable, and another takes its place.

`line.py` says which query is next, `staff.py` which worker, `warming.py` which heads a worker
holds, and `loads.py` what becomes of a version that costs workers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from veilhead_protocol.errors import (
    DrainingError,
    ModelUnavailableError,
    ServiceError,
    WorkerError,
)
from veilhead_protocol.layout import Layout
from veilhead_service import frames
from veilhead_service.head_encryption import HeadKey
from veilhead_service.line import FairLine
from veilhead_service.loads import Catalogue, Loads, Unavailable
from veilhead_service.model_store import StoredModel
from veilhead_service.staff import COST_SECONDS, Reason, Staff, WorkerLimits
from veilhead_service.warming import Warming, refusal_in
from veilhead_service.worker_process import Worker

#: How long the service waits at its start for all workers and their heads, once one is up.
_READY_SECONDS: Final = 10.0

logger = logging.getLogger("veilhead.service")


@dataclass(frozen=True)
class Evaluation:
    """A reply's bytes, and what they took.

    Attributes:
        reply: the reply message.
        seconds: in the worker, from bytes to bytes.
        queue_seconds: until a worker was free that could answer.
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
        unavailable: models that cannot be answered for.
    """

    alive: int
    busy: int
    waiting: int
    evaluations: int
    restarts: Mapping[Reason, int]
    failed_starts: int
    unavailable: tuple[Unavailable, ...] = ()


class WorkerPool:
    """A fixed number of workers, and a bounded line of queries that wait for them."""

    def __init__(
        self,
        workers: int,
        *,
        waiting_per_worker: int,
        evaluation_seconds: float,
        load_seconds: float = 60.0,
        queue_seconds: float = 20.0,
        memory_bytes: int = 2 * 2**30,
        head_bytes: int = 2**30,
        zeros_ahead: int = 16,
        max_evaluations: int | None = None,
        catalogue: Callable[[], Catalogue] = lambda: Catalogue([], {}),
        head_key: HeadKey | None = None,
        shared: bool = False,
    ) -> None:
        """Make a pool; `start` starts its processes.

        Args:
            workers: evaluating processes.
            waiting_per_worker: queries that may wait for each of them.
            evaluation_seconds: an evaluation that takes longer ends with its worker.
            load_seconds: likewise the loading of a head.
            queue_seconds: how long a query waits for a worker.
            memory_bytes: resident memory above which a worker is replaced.
            head_bytes: encoded heads that a worker keeps.
            zeros_ahead: zeros that a worker encrypts ahead for each of the keys that asked last.
            max_evaluations: answers after which a worker is replaced.
            catalogue: the current versions, which workers load before they are asked for them.
            head_key: what encrypted heads are under.
            shared: whether tenants share the line; one may not take all of it then.
        """
        self._size = workers
        self._evaluation_seconds = evaluation_seconds
        self._queue_seconds = queue_seconds
        limits = WorkerLimits(memory_bytes, head_bytes, zeros_ahead, load_seconds, max_evaluations)
        self._line = FairLine[Worker](workers * waiting_per_worker, shared=shared)
        self._staff = Staff(self._line, limits, head_key)
        self._loads = Loads(memory_bytes)
        self._warming = Warming(
            self._staff, self._loads, head_bytes, catalogue, only_one=workers == 1
        )
        self._staff.prepare = self._warming.warm
        self._staff.blame = self._warming.blame
        self._draining = False
        self._evaluations = 0

    async def start(self) -> None:
        """Start the workers: one is up when this returns, and the others soon.

        Raises:
            WorkerError: when the first one does not come up.
        """
        await self._staff.add()
        waited = [
            self._staff.spawn("starting a worker", self._staff.add_at_last)
            for _ in range(self._size - 1)
        ]
        self._staff.spawn("loading heads", self._warming.run)
        waited.append(self._staff.spawn("waiting for heads", self._until_looked))
        _, late = await asyncio.wait(waited, timeout=_READY_SECONDS)
        if late:
            logger.warning(
                "the service answers; %d of %d workers are up, and heads are still loaded",
                len(self._staff.alive),
                self._size,
            )

    async def _until_looked(self) -> None:
        await self._warming.looked.wait()

    async def stop(self) -> None:
        """End every worker. Queries that run or wait are answered as retryable."""
        await self._staff.stop()

    def drain(self) -> None:
        """Take no new queries from now on; those that are here are answered."""
        self._draining = True

    @property
    def ready(self) -> bool:
        """Whether any worker is up, and new queries are taken."""
        return bool(self._staff.alive) and not self._draining

    def stats(self) -> PoolStats:
        """The pool's figures at this moment."""
        staff = self._staff
        return PoolStats(
            alive=len(staff.alive),
            busy=len(staff.alive) - len(staff.free),
            waiting=len(self._line),
            evaluations=self._evaluations,
            restarts={reason: staff.restarts[reason] for reason in Reason},
            failed_starts=staff.failed_starts,
            unavailable=self.unavailable(),
        )

    def unavailable(self) -> tuple[Unavailable, ...]:
        """Every published model that cannot be answered for, by name."""
        return tuple(self._loads.unavailable())

    def retry(self, name: str) -> bool:
        """Try a model that is unavailable again, within seconds; whether it was."""
        return self._loads.retry(name)

    # --- queries ----------------------------------------------------------------------------------

    def admit(self, tenant: str = "") -> None:
        """Refuse a tenant's new query now, before its body is read, if it is to be refused at all.

        Raises:
            DrainingError: when the service is about to stop.
            QueueFullError: when too many queries are waiting, or too many of this tenant's.
        """
        if self._draining:
            raise DrainingError("the service is about to stop; send the same query again later")
        self._staff.refuse_when_stopped()
        if not self._staff.free:
            self._line.check(tenant)

    def check(self, model: StoredModel) -> None:
        """Refuse a query for this version now, if no worker may be given it.

        Raises:
            ModelUnavailableError: when it is quarantined, or too large for any worker.
        """
        self._loads.check(model)

    async def evaluate(
        self,
        model: StoredModel,
        key_id: bytes,
        key: bytes,
        query: bytes,
        *,
        layout: Layout | None = None,
        tenant: str = "",
    ) -> Evaluation:
        """The reply to a query, which is in this layout, or a query of one text.

        Raises:
            WireError: one of its kinds, when the head refuses the query.
            ModelUnavailableError: when the head cannot be loaded, failed its self-test, or is
                quarantined.
            QueueFullError: when too many queries are waiting, or too many of this tenant's.
            WorkerError: when no worker was free in time, the worker was lost or the pool has
                stopped; the same query may be sent again, as after QueueFullError.
            ServiceError: when the evaluation failed for a reason of the service's own.
        """
        digest, cost = model.manifest.digest, (layout or model.manifest.layout).cost
        request = [frames.EVALUATE, digest, os.fsencode(model.directory), key_id, key, query]
        arrived = time.perf_counter()
        try:
            async with asyncio.timeout(self._queue_seconds):
                worker = await self._worker_for(model, tenant, cost)
        except TimeoutError:
            raise WorkerError(
                "no evaluating process was free in time; send the same query again later"
            ) from None
        queue_seconds = time.perf_counter() - arrived
        self._warming.used[digest] = arrived
        worker.met.add(digest)
        seconds = self._evaluation_seconds + cost * COST_SECONDS
        kind, *rest = await self._staff.ask(worker, model, request, seconds)
        self._evaluations += 1
        self._staff.evaluated(worker)
        if kind == frames.REPLY:
            return Evaluation(rest[0], struct.unpack("<d", rest[1])[0], queue_seconds)
        if kind == frames.REFUSED:
            refusal = refusal_in(rest[0])
            if isinstance(refusal, ModelUnavailableError):
                self._loads.refused(model, str(refusal))
            raise refusal
        raise ServiceError("the evaluation failed; the worker's log names the kind of error")

    async def _worker_for(self, model: StoredModel, tenant: str, cost: int) -> Worker:
        """A free worker that may be given this version, the sooner the longer a query waited."""
        self._staff.refuse_when_stopped()
        self._loads.check(model)
        if self._staff.free and self._loads.is_proven(model):
            return self._staff.choose(model)
        with self._line.place(tenant):
            await self._warming.require(model, tenant, cost)
            worker = await self._staff.take(model, tenant, cost)
        try:
            self._loads.check(model)  # it may have cost others their workers meanwhile
        except ModelUnavailableError:
            self._staff.release(worker)
            raise
        return worker
