"""Workers that are warm, chosen well, replaced in time, and never started in a frenzy."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.heads import artifact, unit_rows
from support.processes import freeze, workers_of

from veilhead.session import Session
from veilhead_protocol.errors import WorkerError
from veilhead_service import staff, warming, worker_process
from veilhead_service.loads import head_bytes, read_catalogue, that_fit
from veilhead_service.model_store import ModelStore, publish
from veilhead_service.staff import Reason
from veilhead_service.worker import Evaluator, _Recent
from veilhead_service.workers import PoolStats, WorkerPool


async def until(condition, seconds=20):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


class Bench:
    """A pool, the processes in it, and queries to give it."""

    def __init__(self, pool, before, models):
        self.pool, self._before, self._models = pool, before, models
        self._sessions = {}

    @property
    def pids(self):
        return workers_of() - self._before

    @property
    def stats(self) -> PoolStats:
        return self.pool.stats()

    async def ask(self, name="digits"):
        model = self._models.current(name)
        session = self._sessions.setdefault(name, Session(model.manifest))
        query = session.encrypt(unit_rows(1, model.manifest.head.dimensions)[0])
        async with asyncio.timeout(30):
            return await self.pool.evaluate(model, query.key.id, query.key.message, query.data)


@asynccontextmanager
async def opened(store, size=1, **options):
    options = {"waiting_per_worker": 64, "evaluation_seconds": 30.0} | options
    before, models = workers_of(), ModelStore(store)
    pool = WorkerPool(size, catalogue=lambda: read_catalogue(models), **options)
    await pool.start()
    try:
        yield Bench(pool, before, models)
    finally:
        await pool.stop()
        assert workers_of() <= before


# --- replacement --------------------------------------------------------------------------------


def test_an_idle_worker_that_dies_is_replaced_before_anybody_asks(store):
    async def run():
        async with opened(store, 2) as bench:
            victim = min(bench.pids)
            os.kill(victim, signal.SIGKILL)
            await until(lambda: bench.stats.restarts[Reason.DIED] == 1)
            assert bench.stats.alive == 1
            assert (await bench.ask()).reply  # by the other one
            await until(lambda: bench.stats.alive == 2)
            assert victim not in bench.pids

    asyncio.run(run())


def test_a_worker_is_replaced_after_its_evaluations_without_a_gap(store):
    async def run():
        async with opened(store, max_evaluations=5) as bench:
            before = bench.pids
            alive = []
            for _ in range(12):
                assert (await bench.ask()).reply
                alive.append(bench.stats.alive)
            await until(lambda: bench.pids.isdisjoint(before))
            assert min(alive) >= 1
            assert bench.stats.restarts[Reason.EVALUATIONS] >= 1
            assert bench.stats.restarts[Reason.DIED] == 0
            await until(lambda: len(bench.pids) == bench.stats.alive == 1)
            assert (await bench.ask()).reply

    asyncio.run(run())


def test_a_worker_that_bloats_is_replaced_after_its_answer(store, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_process, "_MEASURE_SECONDS", 0.0)
    head = artifact(3000, 384, name="huge")
    head.save(tmp_path / "huge")
    publish(tmp_path / "huge", tmp_path / "store")
    layout = head.manifest.layout
    size = layout.products * layout.degree * 8  # bytes that the encoded weights need at least

    async def run():
        async with opened(store) as bench:  # how much a warm worker holds
            ((worker,),) = [list(bench.pool._staff.alive)]
            warm = worker.memory_bytes()
        assert warm > 2**24
        models = ModelStore(tmp_path / "store")
        pool = WorkerPool(
            1, waiting_per_worker=8, evaluation_seconds=30.0, memory_bytes=warm + size // 4
        )
        await pool.start()
        try:
            bench = Bench(pool, set(), models)
            (first,) = pool._staff.alive
            assert (await bench.ask("huge")).reply
            assert bench.stats.restarts[Reason.MEMORY] == 1
            await until(lambda: first not in pool._staff.alive)
            assert pool.stats().alive == 1
        finally:
            await pool.stop()

    asyncio.run(run())


def test_a_limit_below_a_warm_worker_does_not_replace_it_for_ever(store, monkeypatch):
    monkeypatch.setattr(worker_process, "_MEASURE_SECONDS", 0.0)

    async def run():
        async with opened(store, memory_bytes=2**20) as bench:
            for _ in range(5):
                await bench.ask()
            assert bench.stats.restarts[Reason.MEMORY] == 0

    asyncio.run(run())


def test_a_crash_loop_does_not_spin(store, monkeypatch):
    monkeypatch.setattr(staff, "_FIRST_PAUSE_SECONDS", 0.4)

    async def run():
        async with opened(store) as bench:
            monkeypatch.setattr(sys, "executable", "/bin/false")
            (pid,) = bench.pids
            os.kill(pid, signal.SIGKILL)
            await until(lambda: bench.stats.failed_starts >= 1)
            assert not bench.pool.ready
            await asyncio.sleep(1.6)  # pauses of 0.4, 0.8 and 1.6 seconds
            assert 1 <= bench.stats.failed_starts <= 4
            monkeypatch.undo()
            await until(lambda: bench.pool.ready)
            assert (await bench.ask()).reply

    asyncio.run(run())


def test_workers_that_die_before_their_first_answer_are_started_ever_more_slowly(store):
    async def run():
        async with opened(store) as bench:
            for _ in range(3):
                await until(lambda: len(bench.pids) == 1 == bench.stats.alive)
                os.kill(*bench.pids, signal.SIGKILL)
                await until(lambda: bench.stats.alive == 0)
            assert bench.pool._staff.useless == 3
            await until(lambda: bench.stats.alive == 1)
            await bench.ask()
            assert bench.pool._staff.useless == 0

    asyncio.run(run())


def test_a_replacement_that_dies_does_not_add_a_worker(store):
    """A worker that leaves has a successor already."""

    async def run():
        async with opened(store, max_evaluations=1) as bench:
            (pid,) = bench.pids
            await bench.ask()
            os.kill(pid, signal.SIGKILL)  # while its successor starts
            await until(lambda: bench.stats.alive == 1 and pid not in bench.pids)
            await asyncio.sleep(0.2)
            assert len(bench.pids) == 1
            assert bench.stats.restarts[Reason.DIED] == 0

    asyncio.run(run())


# --- choice -------------------------------------------------------------------------------------


def test_the_worker_that_answered_last_answers_next(store):
    async def run():
        async with opened(store, 2) as bench:
            await bench.ask()
            (used,) = [worker for worker in bench.pool._staff.alive if worker.evaluations]
            for _ in range(4):
                await bench.ask()
            assert used.evaluations == 5

    asyncio.run(run())


def test_the_worker_that_holds_the_head_is_preferred(store):
    async def run():
        async with opened(store, 2) as bench:
            holder, last = bench.pool._staff.free
            last.met.clear()
            await bench.ask("chapters")
            assert holder.evaluations == 1
            assert last.evaluations == 0

    asyncio.run(run())


def test_queries_that_wait_are_answered_in_their_order(store):
    async def run():
        async with opened(store) as bench:
            (pid,) = bench.pids
            freeze(pid)
            order = []

            async def ask(number):
                await bench.ask()
                order.append(number)

            tasks = []
            for number in range(4):
                tasks.append(asyncio.create_task(ask(number)))
                await until(lambda at=number: bench.stats.waiting == at)
            tasks[2].cancel()
            with pytest.raises(asyncio.CancelledError):
                await tasks[2]
            os.kill(pid, signal.SIGCONT)
            await asyncio.gather(tasks[0], tasks[1], tasks[3])
            assert order == [0, 1, 3]
            assert bench.stats.waiting == 0

    asyncio.run(run())


def test_nobody_waits_for_ever(store):
    async def run():
        async with opened(store, queue_seconds=0.3) as bench:
            (pid,) = bench.pids
            freeze(pid)
            running = asyncio.create_task(bench.ask())
            await until(lambda: bench.stats.busy == 1)
            with pytest.raises(WorkerError, match="free in time"):
                await bench.ask()
            assert bench.stats.waiting == 0
            os.kill(pid, signal.SIGCONT)
            assert (await running).reply
            assert (await bench.ask()).reply

    asyncio.run(run())


def test_the_time_in_the_line_is_told(store):
    async def run():
        async with opened(store) as bench:
            assert (await bench.ask()).queue_seconds < 0.2
            (pid,) = bench.pids
            freeze(pid)
            tasks = [asyncio.create_task(bench.ask()) for _ in range(2)]
            await until(lambda: bench.stats.waiting == 1)
            await asyncio.sleep(0.3)
            os.kill(pid, signal.SIGCONT)
            first, second = await asyncio.gather(*tasks)
            assert first.queue_seconds < 0.2 < 0.3 <= second.queue_seconds < 20

    asyncio.run(run())


# --- heads --------------------------------------------------------------------------------------


def test_every_worker_holds_every_current_version_before_it_is_asked(store):
    async def run():
        async with opened(store, 2) as bench:
            expected = {model.manifest.digest for model in read_catalogue(ModelStore(store)).models}
            assert len(expected) == 4
            assert all(worker.met == expected for worker in bench.pool._staff.alive)

    asyncio.run(run())


def test_what_is_published_later_is_loaded_in_the_background(store, tmp_path, monkeypatch):
    monkeypatch.setattr(warming, "_WARM_SECONDS", 0.05)

    async def run():
        async with opened(tmp_path / "store", 2) as bench:
            assert all(not worker.met for worker in bench.pool._staff.alive)
            artifact(3, 32, name="late").save(tmp_path / "late")
            digest = publish(tmp_path / "late", tmp_path / "store").digest
            await until(lambda: all(worker.met == {digest} for worker in bench.pool._staff.alive))
            await until(lambda: bench.stats.busy == 0)
            assert (await bench.ask("late")).reply

    asyncio.run(run())


def test_heads_that_do_not_fit_are_loaded_when_they_are_asked_for(store):
    models = read_catalogue(ModelStore(store)).models
    sizes = {model.manifest.name: head_bytes(model.manifest) for model in models}
    limit = sum(sizes.values()) - 1

    async def run():
        async with opened(store, 2, head_bytes=limit) as bench:
            fitting = {model.manifest.digest for model in that_fit(models, limit, {})}
            assert len(fitting) == len(models) - 1
            assert all(worker.met == fitting for worker in bench.pool._staff.alive)
            for name in sizes:
                assert (await bench.ask(name)).reply
            assert bench.stats.unavailable == ()

    asyncio.run(run())


def test_a_worker_that_takes_anothers_place_answers_before_it_has_loaded_everything(
    tmp_path, monkeypatch
):
    """Nobody else is there: what it is asked for comes first."""
    for number in range(25):
        artifact(100, 384, name=f"model-{number}").save(tmp_path / f"model-{number}")
        publish(tmp_path / f"model-{number}", tmp_path / "store")

    async def run():
        async with opened(tmp_path / "store") as bench:
            (worker,) = bench.pool._staff.alive
            assert len(worker.met) == 25
            os.kill(*bench.pids, signal.SIGKILL)
            await until(lambda: bench.pool.ready is False)
            assert (await bench.ask("model-24")).reply
            (worker,) = bench.pool._staff.alive
            assert len(worker.met) < 25
            await until(lambda: len(worker.met) == 25)

    asyncio.run(run())


def test_a_planned_successor_has_loaded_everything_when_it_takes_over(store):
    async def run():
        async with opened(store, max_evaluations=3) as bench:
            (first,) = bench.pool._staff.alive
            for _ in range(3):
                assert (await bench.ask()).reply
            await until(lambda: first not in bench.pool._staff.alive)
            (successor,) = bench.pool._staff.alive
            assert len(successor.met) == 4
            assert not successor.evaluations

    asyncio.run(run())


def test_many_workers_do_not_start_all_at_once(store, monkeypatch):
    monkeypatch.setattr(staff, "_STARTS_AT_ONCE", 2)
    starting, most = set(), []
    start = staff.Worker.start

    async def counted(*arguments):
        mark = object()
        starting.add(mark)
        most.append(len(starting))
        try:
            return await start(*arguments)
        finally:
            starting.discard(mark)

    monkeypatch.setattr(staff.Worker, "start", counted)

    async def run():
        async with opened(store, 5) as bench:
            await until(lambda: bench.stats.alive == 5)
            assert max(most) == 2
            assert (await bench.ask()).reply

    asyncio.run(run())


def test_a_head_that_cannot_be_loaded_leaves_the_others(tmp_path, caplog):
    for name in ("bad", "good"):
        artifact(3, 32, name=name).save(tmp_path / name)
        publish(tmp_path / name, tmp_path / "store")
    (path,) = (tmp_path / "store" / "bad").glob("*/head.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")

    async def run():
        async with opened(tmp_path / "store") as bench:
            assert (await bench.ask("good")).reply
            assert bench.stats.alive == 1

    asyncio.run(run())
    assert "the model bad cannot be loaded" in caplog.text


def test_a_model_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    for name in ("bad", "good"):
        artifact(3, 32, name=name).save(tmp_path / name)
        publish(tmp_path / name, tmp_path / "store")
    (tmp_path / "store" / "bad" / "current").write_text("nonsense")
    found = read_catalogue(ModelStore(tmp_path / "store"))
    assert [model.manifest.name for model in found.models] == ["good"]
    assert "does not hold a digest" in found.unreadable["bad"]


def test_held_heads_are_bounded_in_bytes(store):
    models = read_catalogue(ModelStore(store)).models
    heads = [Evaluator().head(m.manifest.digest, os.fsencode(m.directory)) for m in models]
    sizes = [head.held_bytes for head in heads]
    assert min(sizes) >= 2048 * 8
    held = _Recent(sum(sizes) - 1, lambda head: head.held_bytes)
    for number, head in enumerate(heads):
        held.find(bytes([number]), lambda head=head: head)
    assert list(held) == [bytes([number]) for number in range(1, len(heads))]
    lonely = _Recent(1, lambda head: head.held_bytes)
    assert lonely.find(b"0", lambda: heads[0]) is heads[0]
    assert list(lonely) == [b"0"]


# --- processes ----------------------------------------------------------------------------------


def test_workers_write_no_core_dumps_and_give_way_to_the_service(store):
    async def run():
        async with opened(store) as bench:
            (pid,) = bench.pids
            limits = Path(f"/proc/{pid}/limits").read_text()
            (line,) = [row for row in limits.splitlines() if row.startswith("Max core file size")]
            assert line.split()[4:6] == ["0", "0"]
            assert os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, 0)
            await bench.ask()

    asyncio.run(run())


def test_core_dumps_are_forbidden_for_the_whole_process():
    script = (
        "import ctypes, resource\n"
        "from veilhead_protocol.hardening import forbid_core_dumps\n"
        "forbid_core_dumps()\n"
        "print(*resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))\n"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.stdout.split() == ["0", "0", "0"], shown.stderr
    assert resource.getrlimit(resource.RLIMIT_CORE)[1] != 0  # of this process: untouched


def test_stats_count_what_happened(store):
    async def run():
        async with opened(store, 2) as bench:
            assert bench.stats == PoolStats(2, 0, 0, 0, dict.fromkeys(Reason, 0), 0)
            await bench.ask()
            for pid in bench.pids:
                freeze(pid)
            tasks = [asyncio.create_task(bench.ask()) for _ in range(3)]
            await until(lambda: bench.stats.waiting == 1)
            assert (bench.stats.busy, bench.stats.evaluations) == (2, 1)
            for pid in bench.pids:
                os.kill(pid, signal.SIGKILL)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert sum(isinstance(result, WorkerError) for result in results) == 2
            assert bench.stats.restarts[Reason.DIED] == 2
            assert bench.stats.evaluations == 2

    asyncio.run(run())
