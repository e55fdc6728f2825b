"""The access log: append-only JSON lines, each of which commits to all before it.

    <state_directory>/access.log              the open file
    <state_directory>/access.log.000001       closed ones, in order

A line is the canonical JSON of a record (keys sorted, no spaces, ASCII). Its `hash` is the SHA-256
of the same record without `hash`; its `previous` is the hash of the record before, across files.
A changed, removed, inserted or moved line breaks the chain where it happened. The end can be cut
off, and the whole file written anew, without a trace in the file itself: keep a recent hash
elsewhere, and give it to `verify` as the anchor.

A record never holds anything that a client sent but sizes: names are those of published models and
of tenants, and a key id is shortened and hashed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from veilhead_protocol.errors import AccessLogError
from veilhead_service.background import reason_of

FILE_NAME: Final = "access.log"

#: `previous` of the first record.
GENESIS: Final = "0" * 64

#: Lines that may wait for the disk. Beyond it, requests go unrecorded or are refused.
_WAITING: Final = 4096
_BATCH: Final = 256
_RETRY_SECONDS: Final = 1.0

logger = logging.getLogger("veilhead.service")


def shortened(key_id: bytes) -> str:
    """What stands for a key id in the log: 16 hexadecimal digits of its SHA-256.

    Enough to find one key's records, and useless to address the key with.
    """
    return hashlib.sha256(key_id).hexdigest()[:16]


def _canonical(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode("ascii")


def _sealed(record: dict[str, Any]) -> tuple[bytes, str]:
    """The line of a record, and the hash that it carries."""
    digest = hashlib.sha256(_canonical(record)).hexdigest()
    return _canonical(record | {"hash": digest}) + b"\n", digest


def _opened(line: bytes) -> dict[str, Any] | None:
    """The record of a line without its line break, or None when it is not one, hash included."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or _canonical(record) != line:
        return None
    without = {name: value for name, value in record.items() if name != "hash"}
    if hashlib.sha256(_canonical(without)).hexdigest() != record.get("hash"):
        return None
    if type(record.get("sequence")) is not int or not isinstance(record.get("previous"), str):
        return None
    return record


def files_of(path: Path) -> list[Path]:
    """The files of a log in order, closed ones first."""
    closed = sorted(path.parent.glob(f"{path.name}.[0-9][0-9][0-9][0-9][0-9][0-9]"))
    return [*closed, path] if path.exists() else closed


@dataclass(frozen=True)
class Verified:
    """A whole chain: how many records, the hash of the last, and what deserves attention."""

    records: int
    head: str
    notes: tuple[str, ...]


def verify(path: Path, *, anchor: str | None = None, after: str | None = None) -> Verified:
    """Check every record of a log, closed files included.

    Args:
        path: the open file.
        anchor: the hash of a record that must be in the chain. Without one nobody can tell whether
            the end is missing.
        after: the hash of the last record in files that were moved away; the chain begins there.

    Raises:
        AccessLogError: naming file and number of the first line that breaks the chain.
    """
    files = files_of(path)
    if not files:
        raise AccessLogError(f"there is no access log at {path}")
    previous, sequence, records, notes = after or GENESIS, 0, 0, list[str]()
    torn: tuple[str, bytes] | None = None  # where an unreadable line is, and what it holds
    found = anchor is None
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise AccessLogError(f"{file} cannot be read: {error.strerror}") from error
        *lines, rest = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            where = f"{file.name} line {number}"
            record = _opened(line)
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
            if record["previous"] != previous or record["sequence"] != sequence + 1:
                raise AccessLogError(
                    f"{where} does not follow the line before: got record {record['sequence']}, "
                    f"expected {sequence + 1}; lines were removed, inserted or moved"
                )
            previous, sequence, records = record["hash"], sequence + 1, records + 1
            found = found or previous == anchor
            if record.get("event") == "interrupted":
                notes.append(f"{where}: {record.get('unrecorded')} requests were not recorded")
        if rest:
            if file != files[-1]:
                raise AccessLogError(f"{file.name} does not end with a line break: it was edited")
            notes.append(f"the last line of {file.name} is unfinished: being written, or torn")
    if torn is not None:
        raise AccessLogError(f"{torn[0]} is not a record: it was edited")
    if not found:
        raise AccessLogError(
            "no record has the anchor's hash: the end was cut off, or the log written anew"
        )
    return Verified(records, previous, tuple(notes))


@dataclass(frozen=True)
class _Item:
    record: dict[str, Any]
    written: Future[None]


class AccessLog:
    """The writer of a log: one thread, a bounded line of records, one process at a time."""

    def __init__(
        self, path: Path, *, sync_seconds: float, file_bytes: int, reserve_bytes: int = 0
    ) -> None:
        """Nothing is touched before `start`.

        Args:
            path: the open file; its directory is made when it is absent.
            sync_seconds: lines are forced to the disk after so long; 0 for every batch of them,
                before anybody is told that they are written.
            file_bytes: the size at which a file is closed.
            reserve_bytes: what is left free of the disk for others (a tenth of a small disk).
        """
        self._path = path
        self._sync_seconds = sync_seconds
        self._file_bytes = file_bytes
        self._reserve_bytes = reserve_bytes
        self._items: queue.Queue[_Item | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None
        self._file = -1
        self._lock_file = -1
        self._size = 0
        self._sequence = 0
        self._previous = GENESIS
        self._unsynced_since: float | None = None
        self._failed = False
        self._unrecorded = 0  # refused by the disk; only the thread counts them
        self._dropped = 0  # found no place in the line; only the event loop counts them
        self._dropped_told = 0
        self._written = 0

    @property
    def available(self) -> bool:
        """Whether the last attempt to write succeeded and there is room for another record."""
        return not self._failed and not self._items.full()

    @property
    def records_written(self) -> int:
        """Records that this process wrote."""
        return self._written

    @property
    def requests_unrecorded(self) -> int:
        """Requests that this process could not record."""
        return self._dropped + self._unrecorded

    def start(self) -> None:
        """Open the log, continue its chain, and start writing.

        Raises:
            AccessLogError: when it cannot be opened, is open elsewhere, or its last record is
                damaged.
        """
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = self._path.with_name(f"{self._path.name}.lock")
            self._lock_file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close_files()
            raise AccessLogError(
                f"{self._path} is written by another process: give each service a "
                "state_directory of its own"
            ) from None
        except OSError as error:
            self._close_files()
            raise AccessLogError(f"{self._path} cannot be opened: {error.strerror}") from error
        try:
            self._resume()
        except OSError as error:
            self._close_files()
            raise AccessLogError(f"{self._path} cannot be opened: {error.strerror}") from error
        except AccessLogError:
            self._close_files()
            raise
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()
        logger.info("the access log goes on after record %d, %s", self._sequence, self._previous)

    def stop(self) -> None:
        """Write what waits, and close the log."""
        if self._thread is None:
            return
        self._items.put(None)
        self._thread.join()
        self._thread = None
        self._close_files()
        logger.info("the access log ends with record %d, %s", self._sequence, self._previous)

    def append(self, **fields: Any) -> Future[None]:
        """Queue a record.

        The future is done once the record is written (and forced to the disk, when `sync_seconds`
        is 0), and holds an `AccessLogError` when it cannot be.
        """
        item = _Item({"event": "request", "time": _now(), **fields}, Future())
        item.written.set_running_or_notify_cancel()  # who waits may go away, the record stays
        try:
            self._items.put_nowait(item)
        except queue.Full:
            self._dropped += 1
            item.written.set_exception(AccessLogError("too many records wait for the disk"))
        return item.written

    def _close_files(self) -> None:
        for descriptor in (self._file, self._lock_file):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock_file = -1

    def _open_file(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._file).st_size

    def _resume(self) -> None:
        """Continue after the last record; a line that a crash tore is kept, ended and marked."""
        self._open_file()
        torn = b""
        for file in reversed(files_of(self._path)):
            content = file.read_bytes()
            whole, line_break, rest = content.rpartition(b"\n")
            if file == self._path:
                torn = rest
            if not line_break:
                continue
            record = _opened(whole.rpartition(b"\n")[2])
            if record is None:
                raise AccessLogError(
                    f"the last record of {file} is damaged; "
                    "`veilhead-server access-log verify` says more. Move the log away to begin "
                    "a new one"
                )
            self._sequence, self._previous = record["sequence"], record["hash"]
            break
        if torn:
            digest = hashlib.sha256(torn).hexdigest()
            marker = {"event": "recovered", "torn_bytes": len(torn), "torn_sha256": digest}
            self._write([marker | {"time": _now()}], before=b"\n")
            logger.warning("the access log ended with a torn line, which is kept and marked")

    def _run(self) -> None:
        ended = False
        while not ended:
            batch, ended = self._next_batch()
            try:
                if batch or self._failed:
                    self._record(batch)
                if ended or self._sync_is_due():
                    self._try_sync()
            except Exception as error:  # the thread goes on: nobody would write after it
                self._fail(batch, error)

    def _fail(self, batch: list[_Item], error: Exception) -> None:
        """Tell of a failure that nobody expected; who waits for these records is told, too."""
        logger.error("the access log failed: %s", reason_of(error), exc_info=error)
        self._failed = True
        for item in batch:
            if not item.written.done():
                self._unrecorded += 1
                item.written.set_exception(AccessLogError("the access log failed"))

    def _next_batch(self) -> tuple[list[_Item], bool]:
        """The records that wait, and whether they are the last ones."""
        pause = _RETRY_SECONDS if self._failed or self._unsynced_since is not None else None
        if self._unsynced_since is not None and not self._failed:
            pause = max(0.0, self._unsynced_since + self._sync_seconds - time.monotonic())
        batch: list[_Item] = []
        try:
            item = self._items.get(timeout=pause)
            while item is not None:
                batch.append(item)
                if len(batch) == _BATCH:
                    return batch, False
                item = self._items.get_nowait()
        except queue.Empty:
            return batch, False
        return batch, True

    def _record(self, batch: list[_Item]) -> None:
        records = [item.record for item in batch]
        unrecorded = self._unrecorded + self._dropped
        if unrecorded > self._dropped_told:
            missed = unrecorded - self._dropped_told
            records.insert(0, {"event": "interrupted", "time": _now(), "unrecorded": missed})
        elif not records:  # it failed, and nobody's record was lost: see whether it works again
            records = [{"event": "interrupted", "time": _now(), "unrecorded": 0}]
        try:
            self._write(records)
        except OSError as error:
            if not self._failed:
                logger.error("the access log cannot be written: %s", error.strerror)
            self._failed = True
            self._unrecorded += len(batch)
            for item in batch:
                item.written.set_exception(AccessLogError("the access log cannot be written"))
            return
        if self._failed:
            logger.warning("the access log can be written again")
        self._failed = False
        self._dropped_told = unrecorded
        self._written += len(batch)
        for item in batch:
            item.written.set_result(None)

    def _write(self, records: list[dict[str, Any]], before: bytes = b"") -> None:
        """Append records, whole or not at all.

        Raises:
            OSError: when they are not written; the chain is then where it was, and what did reach
            the file is cut off by the next attempt.
        """
        if self._failed:
            os.ftruncate(self._file, self._size)  # half a line that nobody was told of
        disk = os.fstatvfs(self._file)
        tenth = disk.f_blocks * disk.f_frsize // 10
        if disk.f_bavail * disk.f_frsize < min(self._reserve_bytes, tenth):
            raise OSError(errno.ENOSPC, "the disk is full but for the reserve")
        if self._size >= self._file_bytes and not before:
            self._rotate()
        data, sequence, previous = before, self._sequence, self._previous
        for record in records:
            sequence += 1
            line, previous = _sealed(record | {"sequence": sequence, "previous": previous})
            data += line
        written = 0
        while written < len(data):
            written += os.write(self._file, data[written:])
        if self._sync_seconds == 0:
            os.fsync(self._file)
        self._size += len(data)
        self._sequence, self._previous = sequence, previous
        if self._sync_seconds > 0 and self._unsynced_since is None:
            self._unsynced_since = time.monotonic()

    def _rotate(self) -> None:
        os.fsync(self._file)
        closed = [file for file in files_of(self._path) if file != self._path]
        number = 1 + (int(closed[-1].suffix[1:]) if closed else 0)
        if self._path.exists():  # else an attempt got so far
            self._path.rename(self._path.with_name(f"{self._path.name}.{number:06d}"))
        full = self._file
        self._open_file()
        os.close(full)
        logger.info("the access log was rotated at record %d, %s", self._sequence, self._previous)

    def _sync_is_due(self) -> bool:
        since = self._unsynced_since
        return since is not None and time.monotonic() >= since + self._sync_seconds

    def _try_sync(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            logger.error("the access log cannot be forced to the disk: %s", error.strerror)
            self._failed = True
        self._unsynced_since = None


def _now() -> str:
    """The time in UTC, RFC 3339, to the millisecond."""
    now = datetime.now(UTC)
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
