"""Columns of CSV and JSONL files, row by row; a bad row does not lose the others."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from veilhead_protocol.errors import InputError

_JSON_LINES = frozenset({".jsonl", ".ndjson"})


def read_columns(path: Path, columns: list[str]) -> list[list[Any]]:
    """The values of each of the columns, in the order of the rows; None where a row has none.

    Raises:
        InputError: when the file cannot be read, or has no such column at all.
    """
    suffix = path.suffix.lower()
    if suffix != ".csv" and suffix not in _JSON_LINES:
        raise InputError(f"{path} is not a .csv, .jsonl or .ndjson file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file)) if suffix == ".csv" else [_parse(row) for row in file]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8: save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path} is not a CSV file ({error})") from error
    for column in columns:
        if rows and not any(column in row for row in rows):
            raise InputError(f"{path} has no column {column!r}")
    return [[row.get(column) for row in rows] for column in columns]


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}
