"""Heads -> workers: loaded ahead where they fit, first by one worker alone, and tried again.

A worker that starts loads the current heads ahead while others answer and nobody waits; otherwise
it answers at once, and loads what it is asked for. Free workers load what is published later.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Final

from veilhead_protocol import errors
from veilhead_protocol.errors import (
    ModelUnavailableError,
    ServiceError,
    VeilheadError,
    WireError,
    WorkerError,
)
from veilhead_service import frames
from veilhead_service.background import reason_of
from veilhead_service.loads import Catalogue, Loads, that_fit
from veilhead_service.model_store import StoredModel
from veilhead_service.staff import Reason, Staff
from veilhead_service.worker_process import Worker

#: Between two looks at the store for versions that the workers do not hold yet.
_WARM_SECONDS: Final = 2.0

#: How long a worker loads ahead in one go.
_AHEAD_SECONDS: Final = 10.0

logger = logging.getLogger("veilhead.service")

#: None when a version was loaded, else why not.
_Outcome = VeilheadError | None


class Warming:
    """Lets the staff load heads.

    Attributes:
        loads: what is known of loading.
        used: when a version was last asked for, by digest.
        looked: set once the store was looked at and the workers of that moment were served.
    """

    def __init__(
        self,
        staff: Staff,
        loads: Loads,
        head_bytes: int,
        catalogue: Callable[[], Catalogue],
        *,
        only_one: bool,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            staff: the workers.
            loads: what is known of loading.
            head_bytes: encoded heads that a worker keeps.
            catalogue: the current versions of the store.
            only_one: whether there is a single worker.
        """
        self.loads = loads
        self.used: dict[bytes, float] = {}
        self.looked = asyncio.Event()
        self._staff = staff
        self._head_bytes = head_bytes
        self._only_one = only_one
        self._catalogue = catalogue
        self._current: list[StoredModel] = []  # what every worker is to hold
        self._first_loads: dict[bytes, asyncio.Task[_Outcome]] = {}
        self._trial: asyncio.Task[None] | None = None
        self._warming: set[Worker] = set()  # workers that are asked to load ahead
        self._again = asyncio.Event()

    async def run(self) -> None:
        """Look at the store again and again, and at once when a load has cost a worker."""
        while True:
            try:
                warming = self.look()
                if not self.looked.is_set() and warming:
                    await asyncio.wait(warming)
            finally:
                self.looked.set()
            self._again.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._again.wait(), _WARM_SECONDS)

    def blame(self, model: StoredModel, reason: str) -> None:
        """A worker was lost while it loaded this version."""
        self.loads.died(model, reason)
        self._again.set()

    def look(self) -> list[asyncio.Task[None]]:
        """Let free workers load what they lack, and try what was unavailable.

        Raises:
            StoreError: when the store cannot be read.
        """
        models, unreadable = self._catalogue()
        self.loads.note_unreadable(unreadable)
        self._current = that_fit(models, self._head_bytes, self.used)
        to_try = self.loads.due() + [model for model in self._current if self._is_too_risky(model)]
        if to_try and (self._trial is None or self._trial.done()):
            alone = partial(self._try_alone, to_try)
            self._trial = self._staff.spawn("trying models alone", alone)
        return [
            self._staff.spawn("loading heads", partial(self.warm, worker))
            for worker in self._staff.free
            if worker not in self._warming and self._lacks(worker)
        ]

    def _is_too_risky(self, model: StoredModel) -> bool:
        """Whether a new version is tried alone first: the only worker answers for the others."""
        return (
            self._only_one
            and self.looked.is_set()
            and not self.loads.is_proven(model)
            and not self.loads.is_put_off(model)
        )

    def _lacks(self, worker: Worker) -> list[StoredModel]:
        return [model for model in self._current if model.manifest.digest not in worker.met]

    async def require(self, model: StoredModel, tenant: str, cost: int) -> None:
        """Wait until some worker has loaded this version.

        Raises:
            ModelUnavailableError: when it cannot be loaded.
            WorkerError: when the worker was lost over it, or everything stops.
        """
        if self.loads.is_proven(model):
            return
        # It is loaded whoever waits for that, and however long: what it tells is of use to all.
        first = self._first_loads.get(model.manifest.digest)
        if first is None:
            first = self._note_first(model, partial(self._take_and_load, model, tenant, cost))
        try:
            failed = await asyncio.shield(first)
        except asyncio.CancelledError:
            if first.cancelled():  # with everything else, and not by whoever waits
                raise WorkerError(
                    "the service is stopping; send the same query again later"
                ) from None
            raise
        if failed is not None:
            raise type(failed)(*failed.args)  # a new one for everybody who waits

    async def warm(self, worker: Worker) -> None:
        """Let a worker load what it lacks, one by one while it is free, or fresh and not wanted."""
        self._warming.add(worker)
        try:
            await self._warm(worker)
        finally:
            self._warming.discard(worker)

    async def _warm(self, worker: Worker) -> None:
        ends = time.monotonic() + _AHEAD_SECONDS
        lacking = self._lacks(worker)
        later = [model for model in lacking if model.manifest.digest in self._first_loads]
        loaded = False
        for model in [model for model in lacking if model not in later] + later:
            first = self._first_loads.get(model.manifest.digest)
            if first is not None:
                await asyncio.wait([first], timeout=max(0.0, ends - time.monotonic()))
            if not self._may_load(worker, model, ends):
                continue
            if worker in self._staff.free:
                self._staff.free.remove(worker)
            if self.loads.is_proven(model):
                failed = await self._load(worker, model)
            else:
                failed = await self._note_first(model, partial(self._load, worker, model))
            loaded = loaded or failed is None
            if worker not in self._staff.fresh:
                self._staff.release(worker)
        if loaded:
            worker.measure()

    def _may_load(self, worker: Worker, model: StoredModel, ends: float) -> bool:
        staff, digest = self._staff, model.manifest.digest
        if worker in staff.fresh:
            others = len(staff.alive) > len(staff.fresh)
            if len(staff.line) or not others or time.monotonic() > ends:
                return False
        elif worker not in staff.free:
            return False
        return (
            digest not in worker.met
            and digest not in self._first_loads
            and not self.loads.is_put_off(model)
            and not self._is_too_risky(model)
        )

    def _note_first(
        self, model: StoredModel, work: Callable[[], Awaitable[_Outcome]]
    ) -> asyncio.Task[_Outcome]:
        """Load a version that no worker holds yet; meanwhile no other worker begins to."""
        digest = model.manifest.digest

        async def load() -> _Outcome:
            try:
                return await work()
            except Exception as error:
                name, reason = model.manifest.name, reason_of(error)
                logger.error("loading %s failed: %s", name, reason, exc_info=error)
                return ServiceError("the head could not be loaded; the log names the kind of error")

        task = self._first_loads[digest] = self._staff.spawn_once(load())
        task.add_done_callback(lambda _: self._first_loads.pop(digest))
        return task

    async def _take_and_load(self, model: StoredModel, tenant: str, cost: int) -> _Outcome:
        try:
            worker = await self._staff.take(model, tenant, cost)
        except WorkerError as error:
            return error
        failed = await self._load(worker, model)
        self._staff.release(worker)
        return failed

    async def _load(self, worker: Worker, model: StoredModel) -> _Outcome:
        """Let a worker that is held load a version."""
        try:
            self.loads.check(model)
            worker.met.add(model.manifest.digest)
            seconds = self._staff.seconds_to_load(model)
            answer = await self._staff.ask(worker, model, _request(model), seconds)
        except (ModelUnavailableError, WorkerError) as error:
            return error
        return self._learn(model, answer)

    def _learn(self, model: StoredModel, answer: list[bytes]) -> _Outcome:
        if answer[0] == frames.READY:
            self.loads.loaded(model)
            return None
        refusal = (
            refusal_in(answer[1])
            if answer[0] == frames.REFUSED
            else ModelUnavailableError("the worker's log names the kind of error")
        )
        self.loads.refused(model, str(refusal))
        return refusal

    async def _try_alone(self, models: list[StoredModel]) -> None:
        """See which of these versions can be loaded, in a process that serves nothing else."""
        worker = await self._staff.start_apart()
        try:
            for model in models:
                if not await self._try(worker, model):
                    return  # the next look goes on with the others
        finally:
            worker.stop()
            self._again.set()

    async def _try(self, worker: Worker, model: StoredModel) -> bool:
        """Let a worker that stands apart load a version; whether the worker is still there."""
        seconds = self._staff.seconds_to_load(model)
        try:
            answer = await worker.ask(model, _request(model), seconds=seconds, load_seconds=seconds)
        except TimeoutError:
            self.loads.died(model, self._staff.how_it_ended(worker, Reason.TIMEOUT))
            return False
        except (OSError, EOFError):
            self.loads.died(model, self._staff.how_it_ended(worker, Reason.DIED))
            return False
        if self._learn(model, answer) is None:
            for one in self._staff.alive:  # they may load it now
                one.met.discard(model.manifest.digest)
        return True


def _request(model: StoredModel) -> list[bytes]:
    return [frames.LOAD, model.manifest.digest, os.fsencode(model.directory)]


def refusal_in(written: bytes) -> WireError | ModelUnavailableError:
    """What a worker's refusal is about."""
    name, message = json.loads(written)
    refusal: WireError | ModelUnavailableError = getattr(errors, name)(message)
    return refusal
