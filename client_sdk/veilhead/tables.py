"""Columns of CSV, JSONL and Parquet files, row by row; a bad row does not lose the others."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from veilhead_protocol.errors import ClientError, InputError

_JSON_LINES: Final = frozenset({".jsonl", ".ndjson"})
_SUFFIXES: Final = frozenset({".csv", ".parquet", *_JSON_LINES})

#: Rows of a Parquet file in memory at once.
_BATCH: Final = 1024


@dataclass(frozen=True)
class TableFile:
    """Some columns of a file that was found to be whole; its rows are read one after the other.

    Attributes:
        path: the file.
        columns: the columns that are read.
        rows: how many rows it has.
    """

    path: Path
    columns: tuple[str, ...]
    rows: int

    @classmethod
    def open(cls, path: Path, columns: Sequence[str]) -> TableFile:
        """Read the file once through, so that nothing of it is wrong halfway.

        Raises:
            InputError: when it cannot be read, or has no such column at all.
            ClientError: when pyarrow is needed and not installed.
        """
        if path.suffix.lower() not in _SUFFIXES:
            raise InputError(f"{path} is not a .csv, .jsonl, .ndjson or .parquet file")
        rows = 0
        missing = dict.fromkeys(columns)
        with _reported(path):
            for row in _rows(path, columns):
                rows += 1
                missing = {name: None for name in missing if name not in row}
        if rows and missing:
            raise InputError(f"{path} has no column {next(iter(missing))!r}")
        return cls(path, tuple(columns), rows)

    def values(self, start: int = 0) -> Iterator[tuple[Any, ...]]:
        """The columns' values, row by row from row `start`; None where a row has none.

        Raises:
            InputError: when the file is no longer what it was.
        """
        with _reported(self.path):
            for number, row in enumerate(_rows(self.path, self.columns)):
                if number >= start:
                    yield tuple(row.get(name) for name in self.columns)


def _rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path, columns)
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        if suffix == ".csv":
            csv.field_size_limit(sys.maxsize)  # notes may be longer than the 128 KiB it allows
            yield from csv.DictReader(file)
        else:
            yield from map(_parse, file)


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ClientError("Parquet files need pyarrow: pip install 'veilhead[tables]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            known = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(_BATCH, columns=known):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not a Parquet file that can be read") from error


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """What goes wrong with a file as errors of ours, which name it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8: save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path} is not a CSV file ({error})") from error
