"""Many clients of unequal tenants for a long time: answers, waiting, memory and open files.

First the light tenants alone, then the same ones beside an abusive tenant, which has many
connections and ignores `Retry-After`. All replay recorded queries.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from rich.table import Table

from veilhead_benchmarks.console import wide_console
from veilhead_benchmarks.load_generator import cpu_seconds
from veilhead_benchmarks.processes import ServiceProcess, add_tenants, publish_random, unit_rows
from veilhead_benchmarks.recording import Exchange, Side, Voice, put
from veilhead_benchmarks.throughput import percentile

#: name: (parameter set, dimensions, classes)
_MODELS: Final = {
    "two": ("standard", 384, 2),
    "chapters": ("standard", 384, 22),
    "intents": ("standard", 384, 77),
    "lasting": ("compact", 384, 10),
}
#: Texts of the queries that each client replays.
_TEXTS: Final = (1, 1, 8)
_SAMPLE_SECONDS: Final = 0.5
_SETTLE_SECONDS: Final = 20.0

#: The first part of a phase fills what may be filled; memory is judged after it.
_WARM_UP: Final = 0.25
#: A slope over less says nothing.
_SLOPE_SECONDS: Final = 120.0

MOST_P99_RATIO: Final = 3.0
MOST_SLOPE_PERCENT: Final = 1.0
#: With fair shares a tenant that always waits gets as much as any other.
LEAST_SHARE: Final = 0.5


@dataclass(frozen=True)
class Phase:
    """One part of a soak.

    Attributes:
        light: what came of the light tenants.
        abuser: what came of the abusive one; None in the part without it.
        livez_p50_ms: median of `/livez` meanwhile.
        livez_p99_ms: its 99th percentile.
        memory_mb: resident memory of service and workers at the end, in 10^6 bytes.
        memory_slope_percent: its growth in 10 minutes, by least squares over all but the first
            quarter of the part, as a share of what is resident; None for a short part.
        most_descriptors: the most open files of service and workers.
        descriptors: those that are open when the clients have gone.
        service_cores: CPU seconds a second of the service's own process.
        worker_cores: of its workers, added up.
    """

    light: Side
    abuser: Side | None
    livez_p50_ms: float
    livez_p99_ms: float
    memory_mb: float
    memory_slope_percent: float | None
    most_descriptors: int
    descriptors: int
    service_cores: float
    worker_cores: float


@dataclass(frozen=True)
class SoakReport:
    """What a soak showed.

    Attributes:
        tenants: light tenants.
        clients: clients of each, one connection each.
        alone: without the abusive tenant.
        beside: with it.
    """

    tenants: int
    clients: int
    alone: Phase
    beside: Phase

    @property
    def p99_ratio(self) -> float | None:
        """The light tenants' p99 with the abusive one over that without it."""
        before, after = self.alone.light.p99_ms, self.beside.light.p99_ms
        return after / before if before and after else None

    @property
    def least_share(self) -> float | None:
        """Answers in time of the light tenant with the fewest, over those of the abusive one."""
        abuser = self.beside.abuser
        had = sum(abuser.in_time.values()) if abuser else 0
        return min(self.beside.light.in_time.values()) / had if had else None

    def promises(self) -> list[tuple[str, bool]]:
        """Every promise that could be judged, and whether it was kept."""
        phases = (self.alone, self.beside)
        sides = [side for phase in phases for side in (phase.light, phase.abuser) if side]
        refused = self.beside.abuser.refused if self.beside.abuser else {}
        judged: list[tuple[str, bool]] = [
            ("no answer is wrong", not any(side.wrong for side in sides)),
            (
                "every query of a light tenant is answered",
                not any(phase.light.lost for phase in phases),
            ),
            ("replies were decrypted", all(phase.light.checked for phase in phases)),
            ("the abusive tenant is refused", bool(refused)),
            ("open files are level", self.beside.descriptors <= self.alone.descriptors),
        ]
        text = f"the light tenants' p99 grows at most {MOST_P99_RATIO:g} times"
        judged.append((text, self.p99_ratio is not None and self.p99_ratio <= MOST_P99_RATIO))
        if self.least_share is not None:
            text = f"each light tenant has {LEAST_SHARE:g} of the abusive one's answers"
            judged.append((text, self.least_share >= LEAST_SHARE))
        slope = self.beside.memory_slope_percent
        if slope is not None:
            text = f"memory grows less than {MOST_SLOPE_PERCENT:g} % in 10 minutes"
            judged.append((text, slope < MOST_SLOPE_PERCENT))
        return judged

    @property
    def passed(self) -> bool:
        """Whether every promise that could be judged was kept."""
        return all(kept for _, kept in self.promises())


@contextmanager
def _probed(port: int) -> Iterator[list[float]]:
    """The seconds of every `/livez` during the block; filled when it ends."""
    command = [sys.executable, "-m", "veilhead_benchmarks.livez_probe", str(port)]
    seconds: list[float] = []
    with subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as probe:
        try:
            yield seconds
        finally:
            output, _ = probe.communicate()
        seconds += json.loads(output)


@dataclass(frozen=True)
class _Sample:
    seconds: float
    resident_bytes: int
    descriptors: int

    @classmethod
    def of(cls, service: ServiceProcess) -> _Sample:
        return cls(time.monotonic(), service.resident_bytes(), service.descriptors())


@contextmanager
def _watched(service: ServiceProcess) -> Iterator[list[_Sample]]:
    """What the service holds, again and again during the block."""
    samples = [_Sample.of(service)]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_SAMPLE_SECONDS):
            samples.append(_Sample.of(service))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def slope_percent(samples: Sequence[tuple[float, int]]) -> float | None:
    """Growth in 10 minutes as a share of the mean, from (seconds, bytes) after the warm-up."""
    late = samples[int(len(samples) * _WARM_UP) :]
    if len(late) < 2 or samples[-1][0] - samples[0][0] < _SLOPE_SECONDS:
        return None
    times, sizes = np.array(late, dtype=np.float64).T
    each_second = float(np.polyfit(times - times[0], sizes, 1)[0])
    return round(each_second * 600 / float(sizes.mean()) * 100, 3)


def _settled(service: ServiceProcess, wanted: int | None) -> int:
    """Open files once the clients have gone: at most `wanted`, or those that are left in the end.

    Without `wanted`, those of one whole second without a change.
    """
    deadline = time.monotonic() + _SETTLE_SECONDS
    found, since = service.descriptors(), time.monotonic()
    while time.monotonic() < deadline:
        now = service.descriptors()
        if wanted is not None and now <= wanted:
            return now
        if now != found:
            found, since = now, time.monotonic()
        if wanted is None and time.monotonic() - since > 1:
            break
        time.sleep(0.1)
    return found


def _phase(
    service: ServiceProcess,
    light: Sequence[Voice],
    abuser: Sequence[Voice],
    seconds: float,
    descriptors: int | None,
) -> Phase:
    workers = tuple(service.workers())
    own, theirs, started = cpu_seconds((service.pid,)), cpu_seconds(workers), time.monotonic()
    with _watched(service) as samples, _probed(service.port) as livez:
        found, other = put(service, light, abuser, seconds, polite=False)
    took = time.monotonic() - started
    return Phase(
        light=found,
        abuser=other,
        livez_p50_ms=round(percentile(livez, 50) * 1e3, 2),
        livez_p99_ms=round(percentile(livez, 99) * 1e3, 2),
        memory_mb=round(samples[-1].resident_bytes / 1e6, 1),
        memory_slope_percent=slope_percent([(one.seconds, one.resident_bytes) for one in samples]),
        most_descriptors=max(sample.descriptors for sample in samples),
        descriptors=_settled(service, descriptors),
        service_cores=round((cpu_seconds((service.pid,)) - own) / took, 3),
        worker_cores=round((cpu_seconds(workers) - theirs) / took, 3),
    )


def run_soak(
    *,
    seconds: float,
    workers: int = 2,
    tenants: int = 8,
    clients: int = 8,
    abuser_connections: int = 128,
    environment: Mapping[str, str] | None = None,
) -> SoakReport:
    """Let the light tenants ask alone for half of the time, and beside an abusive one for the rest.

    Args:
        seconds: of both parts together.
        workers: evaluating processes of the service.
        tenants: how many; the last one is abusive.
        clients: clients of each tenant, each with keys of its own; the models are shared out.
        abuser_connections: connections of the abusive tenant.
        environment: further variables of the service.
    """
    with tempfile.TemporaryDirectory(prefix="veilhead-soak-") as name:
        work = Path(name)
        artifacts = [
            publish_random(work / "store", work, model, classes, dimensions, parameters)
            for model, (parameters, dimensions, classes) in _MODELS.items()
        ]
        api_keys = add_tenants(work / "state", tenants)
        settings = {"insecure_no_tenants": False, "state_directory": work / "state"}
        with ServiceProcess(
            work / "store",
            work / "service.log",
            workers=workers,
            settings=settings,
            environment=environment,
        ) as service:

            def voice(tenant: int, client: int, connections: int) -> Voice:
                artifact = artifacts[client % len(artifacts)]
                dimensions, seed = artifact.manifest.head.dimensions, tenant * 2**10 + client
                exchanges = [
                    Exchange.record(
                        service,
                        artifact,
                        unit_rows(texts, dimensions, seed * 2**10 + place),
                        api_keys[tenant],
                    )
                    for place, texts in enumerate(_TEXTS)
                ]
                return Voice(f"tenant-{tenant}", connections, tuple(exchanges))

            light = [
                voice(number, each, 1) for number in range(tenants - 1) for each in range(clients)
            ]
            abuser = [
                voice(tenants - 1, each, abuser_connections // clients) for each in range(clients)
            ]
            alone = _phase(service, light, [], seconds / 2, None)
            beside = _phase(service, light, abuser, seconds / 2, alone.descriptors)
    return SoakReport(tenants - 1, clients, alone, beside)


def show(report: SoakReport, out: Path) -> None:
    """Write the report as JSON, and print it."""
    promises = report.promises()
    out.parent.mkdir(parents=True, exist_ok=True)
    derived = {"p99_ratio": report.p99_ratio, "least_share": report.least_share}
    found = asdict(report) | derived | {"promises": dict(promises)}
    out.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    console = wide_console()
    table = Table(title=f"{report.tenants} light tenants of {report.clients} clients")
    for title in ("", "alone", "beside the abusive one", "the abusive one"):
        table.add_column(title, justify="left" if not title else "right")
    sides = (report.alone.light, report.beside.light, report.beside.abuser)
    for text, values in _side_rows([side for side in sides if side]):
        table.add_row(text, *map(str, values))
    table.add_section()
    for field in list(asdict(report.alone))[2:]:
        values = [getattr(phase, field) for phase in (report.alone, report.beside)]
        table.add_row(field.replace("_", " "), *map(str, values), "")
    console.print(table)
    for text, value in derived.items():
        rounded = "-" if value is None else f"{value:.2f}"
        console.print(f"{text.replace('_', ' '):12}{rounded}", highlight=False)
    for text, kept in promises:
        console.print(f"{'kept  ' if kept else 'BROKEN'}  {text}", highlight=False)
    console.print(f"results in {out}", markup=False, highlight=False)


def _side_rows(sides: Sequence[Side]) -> Iterator[tuple[str, list[object]]]:
    yield "p50 ms", [side.p50_ms for side in sides]
    yield "p99 ms", [side.p99_ms for side in sides]
    yield "connections", [side.connections for side in sides]
    yield "answers", [side.answered for side in sides]
    yield "of these in time", [sum(side.in_time.values()) for side in sides]
    yield "of the tenant with the fewest", [min(side.in_time.values()) for side in sides]
    yield "refusals", [side.refusals for side in sides]
    yield "wrong", [side.wrong for side in sides]
    yield "lost", [side.lost for side in sides]
    yield "broken connections", [side.broken for side in sides]
    yield "replies decrypted", [side.checked for side in sides]
    yield "generator cores", [side.generator_cores for side in sides]
