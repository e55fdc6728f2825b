"""The access log as it lies on the disk: records, their chain, and what it says of the state.

`access_log.py` writes it, and says what a record is. A file begins with a record of the event
`continued` where another came before it: its `previous` is the hash of that one's last record.
`continued`, `state` and `keys-ended` carry `state`, `epoch` and `token`: which state the service
had, and how many times keys had been ended in it. docs/operations/tenants.md says what for.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from veilhead_protocol.errors import AccessLogError

FILE_NAME: Final = "access.log"

#: `previous` of the first record.
GENESIS: Final = "0" * 64


def canonical(record: dict[str, Any]) -> bytes:
    """A record's bytes, which are hashed."""
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode("ascii")


def sealed(record: dict[str, Any]) -> tuple[bytes, str]:
    """The line of a record, and the hash that it carries."""
    digest = hashlib.sha256(canonical(record)).hexdigest()
    return canonical(record | {"hash": digest}) + b"\n", digest


def opened(line: bytes) -> dict[str, Any] | None:
    """The record of a line without its line break, or None when it is not one, hash included."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or canonical(record) != line:
        return None
    without = {name: value for name, value in record.items() if name != "hash"}
    if hashlib.sha256(canonical(without)).hexdigest() != record.get("hash"):
        return None
    if type(record.get("sequence")) is not int or not isinstance(record.get("previous"), str):
        return None
    return record


def files_of(path: Path) -> list[Path]:
    """The files of a log in order, closed ones first."""
    closed = sorted(path.parent.glob(f"{path.name}.[0-9][0-9][0-9][0-9][0-9][0-9]"))
    return [*closed, path] if path.exists() else closed


def read(file: Path) -> bytes:
    """The content of a file of a log.

    Raises:
        AccessLogError: when it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise AccessLogError(f"{file} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Witness:
    """What the log says of the state: its id, and the last command that ended keys in it.

    `epoch` is 0 and `token` empty where there was none yet.
    """

    state: str
    epoch: int
    token: str

    @classmethod
    def of(cls, record: dict[str, Any]) -> Witness | None:
        """The witness that a record carries, when it carries one."""
        state, epoch, token = (record.get(name) for name in ("state", "epoch", "token"))
        if not isinstance(state, str) or type(epoch) is not int or not isinstance(token, str):
            return None
        return cls(state, epoch, token)

    def fields(self) -> dict[str, Any]:
        """As a record carries it."""
        return {"state": self.state, "epoch": self.epoch, "token": self.token}


@dataclass(frozen=True)
class End:
    """Where a log ends: number and hash of its last record, and the last witness.

    `file` is the file of the last record, `torn` what follows it there.
    """

    sequence: int = 0
    head: str = GENESIS
    witness: Witness | None = None
    file: Path | None = None
    torn: bytes = b""


def end_of(path: Path) -> End:
    """The end of a log.

    Where there is no record under its own names, the file that was moved away last counts: it then
    lies beside them, as `access.log.1` or `access.log-20261129` does.

    Raises:
        AccessLogError: when a file cannot be read, or its last record is damaged.
    """
    for file in reversed(files_of(path)):
        end = _end_of_file(file)
        if end is not None:
            return end
    moved = []
    for file in _moved_away(path):
        with suppress(AccessLogError):  # it need not be a log at all
            moved.append(_end_of_file(file))
    return max((end for end in moved if end), key=lambda end: end.sequence, default=End())


def _moved_away(path: Path) -> list[Path]:
    known = set(files_of(path))
    found = [*path.parent.glob(f"{path.name}.*"), *path.parent.glob(f"{path.name}-*")]
    packed = (".gz", ".xz", ".bz2", ".zst")
    return [
        file
        for file in sorted(found)
        if file not in known and file.suffix not in packed and file.is_file()
    ]


def _end_of_file(file: Path) -> End | None:
    whole, line_break, torn = read(file).rpartition(b"\n")
    if not line_break:
        return None
    record = opened(whole.rpartition(b"\n")[2])
    if record is None:
        raise AccessLogError(
            f"the last record of {file} is damaged; "
            "`veilhead-server access-log verify` says more. Move the log away to begin "
            "a new one"
        )
    place = whole.rfind(b'"epoch":')
    witness = None
    if place >= 0:
        line = whole[whole.rfind(b"\n", 0, place) + 1 :].partition(b"\n")[0]
        witness = Witness.of(opened(line) or {})
    return End(record["sequence"], record["hash"], witness, file, torn)


def records_of(path: Path, event: str) -> list[dict[str, Any]]:
    """The records of an event, oldest first, of the files that are still here.

    Raises:
        AccessLogError: when a file cannot be read.
    """
    needle = f'"event":"{event}"'.encode("ascii")
    found = []
    for file in [*_moved_away(path), *files_of(path)]:
        for line in read(file).split(b"\n"):
            record = opened(line) if needle in line else None
            if record is not None and record.get("event") == event:
                found.append(record)
    return sorted(found, key=lambda record: int(record["sequence"]))


def holds(path: Path, sequence: int, head: str) -> bool | None:
    """Whether the log has this record; None when its file was moved away.

    Raises:
        AccessLogError: when a file cannot be read.
    """
    needle = f'"sequence":{sequence}}}'.encode("ascii"), f'"sequence":{sequence},'.encode("ascii")
    begins: list[int] = []
    for file in reversed([*_moved_away(path), *files_of(path)]):
        content = read(file)
        for line in content.split(b"\n"):
            if any(part in line for part in needle):
                record = opened(line)
                if record is not None and record["sequence"] == sequence:
                    return bool(record["hash"] == head)
        first = opened(content.partition(b"\n")[0])
        if first is not None:
            begins.append(first["sequence"])
    return None if begins and min(begins) > sequence else False


@dataclass(frozen=True)
class Verified:
    """A whole chain: how many records, the hash of the last, and what deserves attention."""

    records: int
    head: str
    notes: tuple[str, ...]


def verify(
    path: Path, *more: Path, anchor: str | None = None, after: str | None = None
) -> Verified:
    """Check every record of a log.

    Args:
        path: the open file, whose closed ones beside it count; or the first of several files.
        more: the other files, in order.
        anchor: the hash of a record that must be in the chain. Without one nobody can tell whether
            the end is missing.
        after: the hash of the last record in files that were moved away; the chain begins there.

    Raises:
        AccessLogError: naming file and number of the first line that breaks the chain, or saying
            that there is no record.
    """
    files = [path, *more] if more else files_of(path)
    if not files:
        raise AccessLogError(f"there is no access log at {path}")
    previous, sequence, records, notes = after or GENESIS, 0, 0, list[str]()
    torn: tuple[str, bytes] | None = None  # where an unreadable line is, and what it holds
    found = anchor in (None, previous)
    for file in files:
        *lines, rest = read(file).split(b"\n")
        for number, line in enumerate(lines, 1):
            where = f"{file.name} line {number}"
            record = opened(line)
            if record is None:
                if torn is not None:
                    raise AccessLogError(f"{torn[0]} is not a record: it was edited")
                torn = where, line
                continue
            if torn is not None:
                if (
                    record.get("event") != "recovered"
                    or record.get("torn_sha256") != hashlib.sha256(torn[1]).hexdigest()
                ):
                    raise AccessLogError(f"{torn[0]} is not a record: it was edited")
                notes.append(f"{torn[0]} was torn by a crash, as the next line says")
                torn = None
            elif record.get("event") == "recovered":
                raise AccessLogError(f"the torn line before {where} was removed")
            if after is not None and sequence == 0:
                sequence = record["sequence"] - 1
            if records == 0 and after is None and record["sequence"] > 1:
                raise AccessLogError(
                    f"{where} does not follow the line before: it is record "
                    f"{record['sequence']}, whose forerunners are not here: give their files "
                    "first, in order, or the hash of the last of them as --after"
                )
            if record["previous"] != previous or record["sequence"] != sequence + 1:
                raise AccessLogError(
                    f"{where} does not follow the line before: got record {record['sequence']}, "
                    f"expected {sequence + 1}; lines were removed, inserted or moved"
                )
            previous, sequence, records = record["hash"], sequence + 1, records + 1
            found = found or previous == anchor
            if record.get("event") == "interrupted":
                notes.append(f"{where}: {record.get('unrecorded')} requests were not recorded")
            if record.get("event") == "continued" and record.get("reason") != "full":
                notes.append(f"{where}: the file before was {record.get('reason')}")
        if rest:
            if file != files[-1]:
                raise AccessLogError(f"{file.name} does not end with a line break: it was edited")
            notes.append(f"the last line of {file.name} is unfinished: being written, or torn")
    if torn is not None:
        raise AccessLogError(f"{torn[0]} is not a record: it was edited")
    if not found:
        raise AccessLogError(
            "no record has the expected hash: the end was cut off, or the log written anew"
        )
    if records == 0 and anchor is None:
        raise AccessLogError(
            "there is no record: the log was emptied, unless nothing was ever recorded (then "
            f"--head {GENESIS} says so)"
        )
    return Verified(records, previous, tuple(notes))
