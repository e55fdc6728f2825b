"""Answers to a file's rows in a file of their own, which a killed run leaves fit to be continued.

A line is written for each row, in order. Beside the file, `<name>.run.json` says which model
version, input and options its lines are of: digests and options, no text, seed or key.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

from veilhead.frames import columns, flat
from veilhead.predictions import Prediction, Shape
from veilhead_protocol.errors import InputError, VeilheadError

_FORMAT: Final = "veilhead-run/1"
_MAX_IDENTITY_BYTES: Final = 2**20


def json_line(row: int, answer: list[Prediction] | VeilheadError) -> str:
    """One row's answer as a line of JSON."""
    if isinstance(answer, VeilheadError):
        return json.dumps({"row": row, "error": {"code": answer.code, "message": str(answer)}})
    found = [asdict(prediction) for prediction in answer]
    return json.dumps({"row": row, "predictions": found}, ensure_ascii=False)


@dataclass
class Run:
    """An open file of answers, whose rows so far are whole.

    Attributes:
        rows: rows that are answered, failed ones included.
        failed: how many of them failed.
    """

    rows: int
    failed: int
    _file: BinaryIO
    _lines: _Lines

    def write(self, answer: list[Prediction] | VeilheadError) -> None:
        """Add the next row's answer."""
        self._file.write(self._lines.line(self.rows, answer))
        self._file.flush()
        self.rows += 1
        self.failed += isinstance(answer, VeilheadError)


@contextmanager
def opened_run(path: Path, shape: Shape, identity: dict[str, Any]) -> Iterator[Run]:
    """The run that writes to `path`: a new one, or the same one continued.

    Args:
        path: a .jsonl, .ndjson or .csv file. A last line that is not whole is cut off.
        shape: the shape of its answers.
        identity: what must be the same for a run to be continued, as JSON values.

    Raises:
        InputError: when the file belongs to another run or to none, is being written by another
            process, or cannot be written.
    """
    lines = _lines_of(path, shape)
    beside = path.with_name(f"{path.name}.run.json")
    try:
        with path.open("ab+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"another process is writing {path}") from error
            if path.stat().st_size:
                _check_identity(path, beside, identity)
            else:
                _write_identity(beside, identity)
            run = _continued(path, file, lines)
            yield run
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror})") from error


def _write_identity(beside: Path, identity: dict[str, Any]) -> None:
    text = json.dumps({"format": _FORMAT, **identity}, indent=1, sort_keys=True)
    partial = beside.with_name(f"{beside.name}.partial")
    partial.write_text(f"{text}\n", "utf-8")
    partial.replace(beside)


def _check_identity(path: Path, beside: Path, identity: dict[str, Any]) -> None:
    try:
        with beside.open("rb") as file:
            found = json.loads(file.read(_MAX_IDENTITY_BYTES))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise InputError(
            f"{path} exists and no {beside.name} says which run wrote it: give another file, or "
            "remove it"
        )
    for name, value in identity.items():
        if found.get(name) != value:
            raise InputError(
                f"{path} was begun with another {name} ({str(found.get(name))[:64]!r}, now "
                f"{value!r}): go on with the same, or give another file"
            )


def _continued(path: Path, file: BinaryIO, lines: _Lines) -> Run:
    """The run at the end of its last whole line."""
    changed = InputError(
        f"{path} holds a line that this run did not write: give another file, or remove it"
    )
    file.seek(0)
    found = file.read(len(lines.header))
    if not lines.header.startswith(found):
        raise changed
    rows = failed = 0
    end = len(found)
    while (line := file.readline()).endswith(b"\n"):
        has_failed = lines.failed(rows, line)
        if has_failed is None:
            raise changed
        rows, failed, end = rows + 1, failed + has_failed, end + len(line)
    file.truncate(end)
    file.write(lines.header[end:])
    return Run(rows, failed, file, lines)


class _Lines(Protocol):
    """The form of a file: what is written for a row, and whether a whole line is that."""

    header: bytes

    def line(self, row: int, answer: list[Prediction] | VeilheadError) -> bytes: ...

    def failed(self, row: int, line: bytes) -> bool | None:
        """Whether the row failed; None when this is not its line."""


class _JsonLines:
    header = b""

    def line(self, row: int, answer: list[Prediction] | VeilheadError) -> bytes:
        return f"{json_line(row, answer)}\n".encode()

    def failed(self, row: int, line: bytes) -> bool | None:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or found.get("row") != row:
            return None
        return "error" in found


class _CsvLines:
    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._columns = ["row", *columns(shape)]
        self.header = self._joined(self._columns)

    def line(self, row: int, answer: list[Prediction] | VeilheadError) -> bytes:
        return self._joined([row, *flat(answer, self._shape)])

    def failed(self, row: int, line: bytes) -> bool | None:
        try:
            (found,) = csv.reader([line.decode("utf-8")])
        except (ValueError, csv.Error):
            return None
        if len(found) != len(self._columns) or found[0] != str(row):
            return None
        return found[-1] != ""

    def _joined(self, values: Sequence[Any]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(values)
        return text.getvalue().encode("utf-8")


def _lines_of(path: Path, shape: Shape) -> _Lines:
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _JsonLines()
    if path.suffix.lower() == ".csv":
        return _CsvLines(shape)
    raise InputError(f"{path} is not a .jsonl, .ndjson or .csv file")
