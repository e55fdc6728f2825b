"""Many clients for a long time: every answer checked, memory and `/livez` watched.

The clients send embeddings: the backbone is not the subject. Each has a key of its own, and a reply
under any other would be refused by it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from veilhead import BatchError, Client, VeilheadError
from veilhead_benchmarks.console import wide_console
from veilhead_benchmarks.processes import ServiceProcess, add_tenants, publish_random, unit_rows
from veilhead_models.artifact import HeadArtifact

#: name: (parameter set, dimensions, classes)
_MODELS: Final = {
    "two": ("standard", 384, 2),
    "chapters": ("standard", 384, 22),
    "intents": ("standard", 384, 77),
    "lasting": ("compact", 384, 10),
}
_ROWS: Final = 8
_SAMPLE_SECONDS: Final = 0.5

#: The first half of a run fills caches (of keys, above all); memory is judged after it.
_WARM_UP: Final = 0.5


@dataclass(frozen=True)
class SoakReport:
    """What a soak showed.

    Attributes:
        clients: clients at once, each with a key of its own.
        tenants: tenants that they belong to.
        seconds: how long they asked.
        texts: rows that were asked for.
        right: rows whose logits were within the model's error bound.
        wrong: rows whose logits were not.
        errors: failed rows, by code.
        texts_per_second: right rows a second.
        livez_p50_ms: median of `/livez` meanwhile.
        livez_p99_ms: its 99th percentile.
        livez_calls: how often it was asked.
        memory_mb: resident memory of service and workers when the run began, in 10^6 bytes.
        memory_end_mb: the same when it ended.
        memory_slope_mb_per_minute: least squares over the samples of the second half.
    """

    clients: int
    tenants: int
    seconds: float
    texts: int
    right: int
    wrong: int
    errors: dict[str, int]
    texts_per_second: float
    livez_p50_ms: float
    livez_p99_ms: float
    livez_calls: int
    memory_mb: float
    memory_end_mb: float
    memory_slope_mb_per_minute: float

    @property
    def passed(self) -> bool:
        """Whether every row was answered, and right."""
        return self.right == self.texts


class _Tally:
    """Rows by how they ended, counted by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.texts = 0
        self.right = 0
        self.wrong = 0
        self.errors: Counter[str] = Counter()

    def add(self, rows: int, *, right: int, errors: Sequence[str]) -> None:
        with self._lock:
            self.texts += rows
            self.right += right
            self.wrong += rows - right - len(errors)
            self.errors.update(errors)


def _ask(client: Client, artifact: HeadArtifact, rows: NDArray[np.float64], tally: _Tally) -> None:
    codes: list[str] = []
    answers: list[Any] = []
    try:
        answers = list(client.logits(rows))
    except BatchError as error:
        answers, codes = error.results, [failure.code for failure in error.errors.values()]
    except VeilheadError as error:
        codes = [error.code] * len(rows)
    expected, bound = artifact.logits(rows), artifact.manifest.head.error_bound
    right = sum(
        answer is not None and float(np.abs(answer - truth).max()) <= bound
        for answer, truth in zip(answers, expected, strict=False)
    )
    tally.add(len(rows), right=right, errors=codes)


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


def _slope(samples: list[tuple[float, int]]) -> float:
    """Bytes a second, by least squares over the samples after the warm-up."""
    late = samples[int(len(samples) * _WARM_UP) :]
    if len(late) < 2:
        return 0.0
    times, sizes = np.array(late, dtype=np.float64).T
    return float(np.polyfit(times - times[0], sizes, 1)[0])


def run_soak(
    *,
    seconds: float,
    clients: int,
    texts: int,
    workers: int,
    tenants: int,
) -> SoakReport:
    """Ask for at least so many texts and so many seconds.

    Args:
        seconds: how long, at least.
        clients: clients at once; the models are shared out among them.
        texts: rows to ask for, at least.
        workers: evaluating processes of the service.
        tenants: tenants that the clients are shared out among, each with an API key.
    """
    tally = _Tally()
    with tempfile.TemporaryDirectory(prefix="veilhead-soak-") as name:
        work = Path(name)
        artifacts = [
            publish_random(work / "store", work, model, classes, dimensions, parameters)
            for model, (parameters, dimensions, classes) in _MODELS.items()
        ]
        api_keys = add_tenants(work / "state", tenants)
        settings = {"insecure_no_tenants": False, "state_directory": work / "state"}
        with ServiceProcess(
            work / "store", work / "service.log", workers=workers, settings=settings
        ) as service:
            deadline = time.monotonic() + seconds

            def run(number: int) -> None:
                artifact = artifacts[number % len(artifacts)]
                dimensions = artifact.manifest.head.dimensions
                with Client(
                    service.url,
                    artifact.manifest.name,
                    concurrency=2,
                    timeout=120.0,
                    api_key=api_keys[number // len(artifacts) % tenants],
                ) as client:
                    call = 0
                    while time.monotonic() < deadline or tally.texts < texts:
                        call += 1
                        rows = unit_rows(_ROWS, dimensions, number * 2**20 + call)
                        _ask(client, artifact, rows, tally)

            def run_counted(number: int) -> None:
                try:
                    run(number)
                except Exception as error:  # a client that is gone must not look like one that ends
                    kind = error.code if isinstance(error, VeilheadError) else type(error).__name__
                    tally.add(1, right=0, errors=[kind])

            threads = [
                threading.Thread(target=run_counted, args=(number,), daemon=True)
                for number in range(clients)
            ]
            started = time.monotonic()
            samples = [(started, service.resident_bytes())]
            with _probed(service.port) as livez:
                for thread in threads:
                    thread.start()
                while any(thread.is_alive() for thread in threads):
                    time.sleep(_SAMPLE_SECONDS)
                    samples.append((time.monotonic(), service.resident_bytes()))
            took = time.monotonic() - started
    return SoakReport(
        clients=clients,
        tenants=tenants,
        seconds=round(took, 1),
        texts=tally.texts,
        right=tally.right,
        wrong=tally.wrong,
        errors=dict(tally.errors),
        texts_per_second=round(tally.right / took, 1),
        livez_p50_ms=round(float(np.quantile(livez, 0.5)) * 1e3, 2),
        livez_p99_ms=round(float(np.quantile(livez, 0.99)) * 1e3, 2),
        livez_calls=len(livez),
        memory_mb=round(samples[0][1] / 1e6, 1),
        memory_end_mb=round(samples[-1][1] / 1e6, 1),
        memory_slope_mb_per_minute=round(_slope(samples) * 60 / 1e6, 3),
    )


def show(report: SoakReport, out: Path) -> None:
    """Write the report as JSON, and print it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(asdict(report), indent=2) + "\n", "utf-8")
    console = wide_console()
    for name, value in asdict(report).items():
        console.print(f"{name.replace('_', ' '):28}{value}", markup=False, highlight=False)
    console.print(f"results in {out}", markup=False, highlight=False)
