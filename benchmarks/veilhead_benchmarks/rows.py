"""The rows that a run is made of, and the file that holds them.

The file is `{"environment": {...}, "rows": [...], ...}`; docs/benchmarks.md describes every field.
A file is checked when it is read: a comparison of two runs must not compare something else.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args

System = Literal[
    "veilhead",
    "plaintext",
    "tenseal-mm",
    "tenseal-batched",
    "tenseal-bsgs",
    "concrete-ml-logreg",
    "concrete-ml-glwe",
]
SYSTEMS: Final[tuple[str, ...]] = get_args(System)

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Row:
    """One measured case; None where a field does not apply.

    Attributes:
        subject: what was measured; `a/b` for a part of a subject.
        system: who did it.
        parameters: parameter set, or what the system has in its place.
        d: dimensions of an embedding.
        classes: classes of the head.
        batch: texts in one request.
        server_ms: from request bytes to reply bytes, both in memory; median, milliseconds.
        encrypt_ms: from embeddings to request bytes.
        decrypt_ms: from reply bytes to logits.
        total_ms: all of it; end to end, the backbone and HTTP included.
        bytes_keys: what a client registers once.
        bytes_up: of the requests, without HTTP.
        bytes_down: of the replies, without HTTP.
        max_error: largest distance from the plaintext logits.
        note: what else there is to say.
    """

    subject: str
    system: System
    parameters: str
    d: int | None
    classes: int | None
    batch: int | None
    server_ms: float | None = None
    encrypt_ms: float | None = None
    decrypt_ms: float | None = None
    total_ms: float | None = None
    bytes_keys: int | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None
    max_error: float | None = None
    note: str = ""

    @property
    def case(self) -> tuple[Any, ...]:
        """What tells this row from the others of a run."""
        return (self.subject, self.system, self.parameters, self.d, self.classes, self.batch)


FIELDS: Final = tuple(field.name for field in fields(Row))
MEASURES: Final = ("server_ms", "encrypt_ms", "decrypt_ms", "total_ms")
SIZES: Final = ("bytes_keys", "bytes_up", "bytes_down")


class ResultsError(Exception):
    """A file is not one of results; the message says where."""


@dataclass(frozen=True)
class Results:
    """One run.

    Attributes:
        environment: date, machine and versions.
        rows: measured cases, each once.
        extra: further lists by name (`throughput`, `memory`), whose entries are objects.
    """

    environment: Mapping[str, Any]
    rows: tuple[Row, ...]
    extra: Mapping[str, Sequence[Mapping[str, Any]]]

    def find(self, **values: Any) -> list[Row]:
        """The rows whose fields have these values."""
        return [
            row
            for row in self.rows
            if all(getattr(row, name) == value for name, value in values.items())
        ]

    def one(self, **values: Any) -> Row | None:
        """The first such row."""
        return next(iter(self.find(**values)), None)

    @classmethod
    def joined(cls, runs: Sequence[Results]) -> Results:
        """Several runs as one, to be shown together: the first one's environment leads.

        Raises:
            ResultsError: when two of them hold the same.
        """
        first, *others = runs
        cases = [row.case for run in runs for row in run.rows]
        lists = [name for run in runs for name in run.extra]
        if len(set(cases)) != len(cases) or len(set(lists)) != len(lists):
            raise ResultsError("the files hold figures of the same subjects: show them one by one")
        return cls(
            {**first.environment, "others": [run.environment for run in others]},
            tuple(row for run in runs for row in run.rows),
            {name: entries for run in runs for name, entries in run.extra.items()},
        )

    def to_json(self) -> str:
        """The file's text."""
        document = {
            "environment": self.environment,
            "rows": [asdict(row) for row in self.rows],
            **self.extra,
        }
        return json.dumps(document, indent=2) + "\n"

    def save(self, path: Path) -> None:
        """Write the file, and its directory where there is none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), "utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        """The run that a file holds.

        Raises:
            ResultsError: when it cannot be read, or is not as docs/benchmarks.md says.
        """
        try:
            document = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ResultsError(f"{path} holds no results: {error}") from error
        if not isinstance(document, dict) or not {"environment", "rows"} <= document.keys():
            raise ResultsError(f"{path}: expected an object with 'environment' and 'rows'")
        environment, rows = document.pop("environment"), document.pop("rows")
        if not isinstance(environment, dict) or not isinstance(rows, list):
            raise ResultsError(f"{path}: 'environment' is an object and 'rows' a list")
        for name, entries in document.items():
            if not isinstance(entries, list) or not all(isinstance(item, dict) for item in entries):
                raise ResultsError(f"{path}: {name!r} is no list of objects")
        read = tuple(_read_row(row, f"{path}, row {number}") for number, row in enumerate(rows))
        seen: set[tuple[Any, ...]] = set()
        for number, row in enumerate(read):
            if row.case in seen:
                raise ResultsError(f"{path}, row {number}: the case {row.case} occurs twice")
            seen.add(row.case)
        return cls(environment, read, document)


def _read_row(row: object, where: str) -> Row:
    if not isinstance(row, dict) or set(row) != set(FIELDS):
        raise ResultsError(f"{where}: expected exactly the fields {', '.join(FIELDS)}")
    for name in ("subject", "parameters", "note"):
        if not isinstance(row[name], str):
            raise ResultsError(f"{where}: {name} is no text")
    if row["system"] not in SYSTEMS:
        raise ResultsError(f"{where}: the system is none of {', '.join(SYSTEMS)}")
    for name in ("d", "classes", "batch", *SIZES):
        value = row[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ResultsError(f"{where}: {name} is neither an integer nor null")
        if value is not None and value < 0:
            raise ResultsError(f"{where}: {name} is negative")
    for name in (*MEASURES, "max_error"):
        value = row[name]
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ResultsError(f"{where}: {name} is neither a number from zero nor null")
    return Row(**row)


def timed(call: Callable[[], _Value], calls: int, warm_up: int = 1) -> tuple[float, _Value]:
    """The median of the call's milliseconds, and what its last call gave."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        value = call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3, value


def added(*milliseconds: float | None) -> float | None:
    """The sum; None when there is nothing to add."""
    known = [value for value in milliseconds if value is not None]
    return sum(known) if known else None


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """Where and when a run takes place, with the versions of these packages."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
        "versions": {name: version(name) for name in packages},
    }


def _processor() -> str:
    """What the processor calls itself, proc(5)."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
