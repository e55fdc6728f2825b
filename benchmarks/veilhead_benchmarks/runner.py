"""The benchmark runner: every system on the same head and embedding, in one run.

Single queries are measured here, in memory; `throughput.py` measures the service over HTTP. Times
are medians per call. `server_ms` runs from a request's bytes to its reply's bytes, both in memory.
Compare systems within one run only: machines differ, and so do days.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from veilhead.session import SecretKey, Session
from veilhead_benchmarks.console import wide_console
from veilhead_benchmarks.peers.tenseal_mm import (
    DEGREE,
    PRIME_BITS,
    TensealClient,
    TensealService,
)
from veilhead_benchmarks.throughput import measure_throughput, print_throughput
from veilhead_models.artifact import HeadArtifact
from veilhead_service.encrypted_head import ClientKey, EncryptedHead

DIMENSIONS: Final = 384
CLASSES: Final = (2, 22, 77)

_SEED: Final = 1
_CALLS: Final = 51
_WARM_UP: Final = 5
_MM_CALLS: Final = 3

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Row:
    """One measured case; None where it does not apply."""

    subject: str
    system: str
    parameters: str
    d: int
    classes: int
    batch: int
    server_ms: float | None
    encrypt_ms: float | None
    decrypt_ms: float | None
    total_ms: float | None
    bytes_keys: int | None
    bytes_up: int | None
    bytes_down: int | None
    max_error: float | None
    note: str = ""


@dataclass(frozen=True)
class Head:
    """A head and embeddings to measure with; heads of this size occur in practice."""

    weight: NDArray[np.float64]  # [C, d]
    bias: NDArray[np.float64]  # [C]
    embedding: NDArray[np.float64]  # [d], norm one

    @classmethod
    def random(cls, classes: int) -> Head:
        """Rows of norm about ten, as trained heads have them."""
        generator = np.random.default_rng(_SEED)
        embedding = generator.normal(size=DIMENSIONS)
        return cls(
            weight=generator.normal(scale=0.5, size=(classes, DIMENSIONS)),
            bias=generator.normal(size=classes),
            embedding=embedding / np.linalg.norm(embedding),
        )

    @property
    def logits(self) -> NDArray[np.float64]:
        """The plaintext answer [C]."""
        answer: NDArray[np.float64] = self.weight @ self.embedding + self.bias
        return answer


def _timed(
    call: Callable[[], _Value], calls: int = _CALLS, warm_up: int = _WARM_UP
) -> tuple[float, _Value]:
    """The median of the call's milliseconds, and what its last call gave."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        value = call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3, value


def _veilhead(head: Head, parameters: str) -> Row:
    labels = [str(index) for index in range(len(head.bias))]
    artifact = HeadArtifact.from_weights(
        head.weight, head.bias, labels, name="benchmark", parameters=parameters
    )
    manifest = artifact.manifest
    service = EncryptedHead(manifest, artifact.weight, artifact.bias)
    session = Session(manifest)
    encrypt_ms, query = _timed(lambda: session.encrypt(head.embedding))
    key = ClientKey.from_message(query.key.message)
    server_ms, reply = _timed(lambda: service.evaluate(query.data, key))
    decrypt_ms, logits = _timed(lambda: session.decrypt(query, reply))
    key_ms, _ = _timed(lambda: SecretKey(manifest.parameter_set))
    return Row(
        subject="single",
        system="veilhead",
        parameters=parameters,
        d=DIMENSIONS,
        classes=len(labels),
        batch=1,
        server_ms=server_ms,
        encrypt_ms=encrypt_ms,
        decrypt_ms=decrypt_ms,
        total_ms=encrypt_ms + server_ms + decrypt_ms,
        bytes_keys=len(query.key.message),
        bytes_up=len(query.data),
        bytes_down=len(reply),
        max_error=float(np.abs(logits - head.logits).max()),
        note=f"a fresh key takes {key_ms:.2f} ms and serves many queries",
    )


def _tenseal_mm(head: Head) -> Row:
    client = TensealClient()
    keys = client.evaluation_keys()
    service = TensealService(keys, head.weight, head.bias)
    encrypt_ms, query = _timed(lambda: client.encrypt(head.embedding), _MM_CALLS, 1)
    server_ms, reply = _timed(lambda: service.evaluate(query), _MM_CALLS, 0)
    decrypt_ms, logits = _timed(lambda: client.decrypt(reply), _MM_CALLS, 1)
    return Row(
        subject="single",
        system="tenseal-mm",
        parameters=f"N={DEGREE}, primes {'/'.join(map(str, PRIME_BITS))}",
        d=DIMENSIONS,
        classes=len(head.bias),
        batch=1,
        server_ms=server_ms,
        encrypt_ms=encrypt_ms,
        decrypt_ms=decrypt_ms,
        total_ms=encrypt_ms + server_ms + decrypt_ms,
        bytes_keys=len(keys),
        bytes_up=len(query),
        bytes_down=len(reply),
        max_error=float(np.abs(logits - head.logits).max()),
    )


def _plaintext(head: Head) -> Row:
    server_ms, _ = _timed(lambda: head.logits)
    return Row(
        subject="single",
        system="plaintext",
        parameters="numpy float64",
        d=DIMENSIONS,
        classes=len(head.bias),
        batch=1,
        server_ms=server_ms,
        encrypt_ms=None,
        decrypt_ms=None,
        total_ms=server_ms,
        bytes_keys=0,
        bytes_up=8 * DIMENSIONS,
        bytes_down=8 * len(head.bias),
        max_error=0.0,
        note="the floor: no privacy",
    )


def run_benchmarks(out: Path) -> list[Row]:
    """Measure everything, write the JSON file and print a table."""
    console = wide_console()
    load_average = os.getloadavg()[0]
    rows = []
    for classes in CLASSES:
        head = Head.random(classes)
        rows += [
            _plaintext(head),
            _veilhead(head, "compact"),
            _veilhead(head, "strong"),
            _tenseal_mm(head),
        ]
        console.print(f"measured {classes} classes", highlight=False)
    throughput = []
    for classes in CLASSES:
        throughput += measure_throughput(classes)
        console.print(f"measured the throughput of {classes} classes", highlight=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "environment": _environment() | {"load_average_before": load_average},
        "rows": [asdict(row) for row in rows],
        "throughput": [asdict(row) for row in throughput],
    }
    out.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    _print(console, rows)
    print_throughput(console, throughput)
    console.print(f"results in {out}", highlight=False)
    return rows


def _environment() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("veilhead", "tenseal", "numpy")},
    }


def _print(console: Console, rows: list[Row]) -> None:
    table = Table(
        "classes", "system", "server ms", "mm / this", "encrypt ms", "decrypt ms", "keys B", "up B",
        "down B", "max error",
    )  # fmt: skip
    slowest = {row.classes: row.server_ms or 0.0 for row in rows if row.system == "tenseal-mm"}
    for row in rows:
        server_ms = row.server_ms or 0.0
        table.add_row(
            str(row.classes),
            row.system if row.system != "veilhead" else f"veilhead {row.parameters}",
            f"{server_ms:.3f}",
            f"{slowest[row.classes] / server_ms:.0f}",
            "" if row.encrypt_ms is None else f"{row.encrypt_ms:.2f}",
            "" if row.decrypt_ms is None else f"{row.decrypt_ms:.2f}",
            f"{row.bytes_keys}",
            f"{row.bytes_up}",
            f"{row.bytes_down}",
            f"{row.max_error:.1e}",
        )
    console.print(table)
