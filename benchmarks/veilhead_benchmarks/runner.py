"""The benchmark runner: every subject, one after the other, in one run and one file.

Compare systems within one run only: machines differ, and so do hours on a shared one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from threadpoolctl import threadpool_limits

from veilhead_benchmarks.console import wide_console
from veilhead_benchmarks.end_to_end import Case, measure_end_to_end
from veilhead_benchmarks.fidelity import measure_fidelity
from veilhead_benchmarks.heads import Exchange, Head, measure
from veilhead_benchmarks.memory import measure_memory
from veilhead_benchmarks.peers.concrete_ml import (
    PeerUnavailableError,
    concrete_ml_python,
    measure_concrete_ml,
)
from veilhead_benchmarks.peers.plaintext import PlaintextExchange
from veilhead_benchmarks.peers.tenseal_batched import TensealBatchedExchange
from veilhead_benchmarks.peers.tenseal_bsgs import TensealBsgsExchange
from veilhead_benchmarks.peers.tenseal_mm import TensealMmExchange
from veilhead_benchmarks.primitives import floor_of, measure_primitives
from veilhead_benchmarks.queries import VeilheadExchange
from veilhead_benchmarks.rows import Results, Row, System, environment
from veilhead_benchmarks.tables import print_tables
from veilhead_benchmarks.throughput import Loads, measure_throughput
from veilhead_models.backbone import Backbone, minilm
from veilhead_models.datasets import load_dataset
from veilhead_protocol.errors import BackboneError, DatasetError

_VERSIONS: Final = ("veilhead", "tenseal", "numpy", "torch", "uvicorn", "aiohttp")
DIMENSIONS: Final = 384

#: The data set of the end-to-end calls: texts of some hundred words.
NARRATIVES: Final = "cfpb"

#: Calls of what takes long enough to need few.
_SLOW_CALLS: Final = 5

#: From so many texts on a request is slow in that sense.
_MANY_TEXTS: Final = 512


#: Subjects without services, whose times are of one core.
_IN_MEMORY: Final = ("primitives", "queries", "batches", "fidelity")


@dataclass(frozen=True)
class Plan:
    """What a run measures, and for how long.

    Attributes:
        calls: of everything that takes milliseconds.
        peer_calls: of what takes seconds.
        parameters: parameter sets of single queries and of fidelity.
        classes: of single queries at 384 dimensions, all systems.
        large: more of them, but for the slow peers.
        sweep_dimensions: at 20 classes.
        batches: (texts, classes) in one request.
        peer_batches: the same for TenSEAL's batched tensor.
        end_to_end: calls from text to label over HTTP.
        loads: throughput.
        memory: (parameter set, keys, keys in use, classes).
        fidelity: (data set, training rows a label, test rows).
        concrete_ml: whether Concrete ML is measured, in an environment that is made for it.
    """

    calls: int = 51
    peer_calls: int = 3
    parameters: tuple[str, ...] = ("standard", "compact")
    classes: tuple[int, ...] = (2, 8, 20, 77)
    large: tuple[int, ...] = (1024, 4096)
    sweep_dimensions: tuple[int, ...] = ()
    batches: tuple[tuple[int, int], ...] = ((64, 77), (193, 77), (2048, 20), (2048, 77))
    peer_batches: tuple[tuple[int, int], ...] = ((2048, 20),)
    end_to_end: tuple[Case, ...] = (
        Case(1, 8, 151),
        *(Case(1, classes, 51) for classes in (22, 77)),
        *(Case(32, classes, 6) for classes in (8, 22, 77)),
        Case(2048, 8, 1),
    )
    loads: tuple[Loads, ...] = (
        Loads(2, two_workers=False),
        Loads(22),
        Loads(77),
        Loads(1024, shares=()),
    )
    memory: tuple[tuple[str, int, int, int], ...] = (("standard", 1000, 200, 1024),)
    fidelity: tuple[tuple[str, int, int], ...] = (("icd10-chapters", 40, 200), ("cfpb", 25, 100))
    concrete_ml: bool = False


QUICK: Final = Plan()
FULL: Final = Plan(
    large=(150, 512, 1024, 2048, 4096),
    sweep_dimensions=(64, 128, 256, 512, 768, 1024, 2048, 4096),
    batches=tuple((texts, classes) for classes in (20, 77) for texts in (8, 64, 193, 2048, 8192)),
    peer_batches=((2048, 2), (2048, 20), (4096, 20)),
    end_to_end=(*QUICK.end_to_end[:-1], Case(2048, 8, 6)),
    memory=(("standard", 1000, 200, 1024), ("compact", 400, 200, 1024)),
    fidelity=(
        ("icd10-chapters", 40, 200),
        ("icd10-sections-77", 20, 200),
        ("icd10-sections-150", 20, 200),
        ("cfpb", 25, 100),
        ("vader-movies", 200, 200),
    ),
    concrete_ml=True,
)


@dataclass
class _Run:
    """A run's results so far."""

    plan: Plan
    rows: list[Row] = field(default_factory=list)
    throughput: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def primitives(self) -> Iterator[Row]:
        for parameters in self.plan.parameters:
            yield from measure_primitives(parameters, self.plan.calls)

    def queries(self) -> Iterator[Row]:
        """Single queries of every system, head by head."""
        plan = self.plan
        for classes in plan.classes:
            head = Head.random(classes, DIMENSIONS)
            yield self._single(PlaintextExchange(head), "plaintext", head, plan.calls)
            for parameters in plan.parameters:
                yield from self._own_single(head, parameters, plan.calls)
            bsgs = TensealBsgsExchange(head)
            yield self._single(bsgs, "tenseal-bsgs", head, plan.calls)
            yield self._single(TensealMmExchange(head), "tenseal-mm", head, plan.peer_calls)
        for classes in plan.large:
            head = Head.random(classes, DIMENSIONS)
            yield self._single(PlaintextExchange(head), "plaintext", head, plan.calls)
            yield from self._own_single(head, "standard", _SLOW_CALLS)
            bsgs = TensealBsgsExchange(head)
            yield self._single(bsgs, "tenseal-bsgs", head, _SLOW_CALLS)
        for dimensions in plan.sweep_dimensions:
            head = Head.random(20, dimensions)
            yield self._single(PlaintextExchange(head), "plaintext", head, plan.calls)
            yield from self._own_single(head, "standard", _SLOW_CALLS)

    @staticmethod
    def _single(exchange: Exchange, system: System, head: Head, calls: int) -> Row:
        return measure("single", system, exchange, head, batch=1, calls=calls)

    def _own_single(self, head: Head, parameters: str, calls: int) -> Iterator[Row]:
        yield self._single(VeilheadExchange(head, parameters), "veilhead", head, calls)
        yield from self._floor(head, parameters, 1)

    def _floor(self, head: Head, parameters: str, batch: int) -> Iterator[Row]:
        primitives = [row for row in self.rows if row.subject.startswith("primitives/")]
        if primitives:
            yield floor_of(head, parameters, batch, primitives)

    def concrete_ml(self) -> Iterator[Row]:
        """Its two ways, head by head."""
        if self.plan.concrete_ml:
            python = concrete_ml_python()
            for classes in self.plan.classes:
                head = Head.random(classes, DIMENSIONS)
                yield from measure_concrete_ml(head, calls=self.plan.peer_calls, python=python)

    def end_to_end(self) -> Iterator[Row]:
        """From text to label, on narratives of complaints."""
        if self.plan.end_to_end:
            texts = load_dataset(NARRATIVES).test.texts
            yield from measure_end_to_end(self.plan.end_to_end, texts, *minilm())

    def fidelity(self) -> Iterator[Row]:
        """Trained heads, data set by data set."""
        if self.plan.fidelity:
            backbone = Backbone.load(*minilm(), device="cpu")
        for name, rows_per_label, test_rows in self.plan.fidelity:
            yield from measure_fidelity(
                load_dataset(name),
                backbone,
                self.plan.parameters,
                rows_per_label=rows_per_label,
                test_rows=test_rows,
            )

    def throughputs(self) -> Iterator[Row]:
        for loads in self.plan.loads:
            self.throughput += [asdict(entry) for entry in measure_throughput(loads)]
        yield from ()

    def memories(self) -> Iterator[Row]:
        for parameters, keys, in_use, classes in self.plan.memory:
            found = measure_memory(parameters, keys=keys, worker_keys=in_use, classes=classes)
            self.memory += [asdict(entry) for entry in found]
        yield from ()

    def batched(self) -> Iterator[Row]:
        """Many texts at once."""
        plan = self.plan
        for classes in dict.fromkeys(classes for _, classes in (*plan.batches, *plan.peer_batches)):
            head = Head.random(classes, DIMENSIONS)
            for texts in (texts for texts, of in plan.batches if of == classes):
                own, plain = (
                    VeilheadExchange(head, "standard", together=True),
                    PlaintextExchange(head),
                )
                calls = plan.calls if texts < _MANY_TEXTS else _SLOW_CALLS
                yield measure("batch", "plaintext", plain, head, batch=texts, calls=calls)
                yield measure("batch", "veilhead", own, head, batch=texts, calls=calls)
                yield from self._floor(head, "standard", texts)
            for texts in (texts for texts, of in plan.peer_batches if of == classes):
                peer = TensealBatchedExchange(head)
                calls = plan.peer_calls
                yield measure("batch", "tenseal-batched", peer, head, batch=texts, calls=calls)


def subjects(run: _Run) -> dict[str, Callable[[], Iterator[Row]]]:
    """What can be measured, by name, in the order of a run."""
    return {
        "primitives": run.primitives,
        "queries": run.queries,
        "batches": run.batched,
        "concrete-ml": run.concrete_ml,
        "end-to-end": run.end_to_end,
        "throughput": run.throughputs,
        "memory": run.memories,
        "fidelity": run.fidelity,
    }


@contextmanager
def _one_core(wanted: bool) -> Iterator[None]:
    """Without the threads of numpy's matrix product, where one core's work is measured."""
    if wanted:
        with threadpool_limits(limits=1, user_api="blas"):
            yield
    else:
        yield


def run_benchmarks(out: Path, plan: Plan = QUICK, only: Sequence[str] = ()) -> Results:
    """Measure everything, or only these subjects, write the JSON file and print tables.

    Raises:
        ValueError: when a subject has no such name.
    """
    console = wide_console()
    about = environment(_VERSIONS)
    run = _Run(plan)
    known = subjects(run)
    for name in only:
        if name not in known:
            raise ValueError(f"no subject is called {name!r}, expected {', '.join(known)}")
    try:
        _measure(run, [name for name in known if not only or name in only], console)
    finally:  # an error costs no figures that are there
        results = Results(
            about | {"seconds": run.seconds, "left_out": run.left_out},
            tuple(run.rows),
            {"throughput": run.throughput, "memory": run.memory},
        )
        results.save(out)
    print_tables(console, results)
    console.print(f"results in {out}", highlight=False)
    return results


def _measure(run: _Run, names: Sequence[str], console: Console) -> None:
    """Measure these subjects, one after the other."""
    known = subjects(run)
    for name in names:
        started = time.perf_counter()
        with _one_core(name in _IN_MEMORY):
            try:
                for row in known[name]():
                    run.rows.append(row)
            except (PeerUnavailableError, DatasetError, BackboneError) as error:
                # What cannot be had here (no network, say) costs no other subject its figures.
                run.left_out.append(f"{name}: {error}")
                console.print(f"left out: {name}: {error}", style="yellow", markup=False)
        run.seconds[name] = round(time.perf_counter() - started, 1)
        console.print(f"{name}: {run.seconds[name]:.0f} s", highlight=False)
