"""The access log: append-only JSON lines, each of which commits to all before it.

    <state_directory>/access.log              the open file
    <state_directory>/access.log.000001       closed ones, in order

A line is the canonical JSON of a record (keys sorted, no spaces, ASCII). Its `hash` is the SHA-256
of the same record without `hash`; its `previous` is the hash of the record before, across files.
A changed, removed, inserted or moved line breaks the chain where it happened. The end can be cut
off, and the whole file written anew, without a trace in the file itself: keep a recent hash
elsewhere, and give it to `verify` as the anchor. A file that another program moves away or empties
is followed by a record `continued`, which goes on where it ended.

A record never holds anything that a client sent but sizes: names are those of published models and
of tenants, and a key id is shortened and hashed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
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

from veilhead_protocol.copies import process_mark
from veilhead_protocol.errors import AccessLogError
from veilhead_service.access_log_chain import End, Witness, end_of, files_of, sealed
from veilhead_service.background import reason_of

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


@dataclass(frozen=True)
class _Item:
    record: dict[str, Any]
    written: Future[None]
    sync: bool = False


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
        self._process = 0  # whose the thread is
        self._file = -1
        self._lock_file = -1
        self._size = 0
        self._end = End()
        self._continues: str | None = None  # why a file was begun that has no record yet
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
    def running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._thread is not None

    @property
    def end(self) -> End:
        """Number and hash of the last record, and what the log says of the state."""
        return self._end

    @property
    def path(self) -> Path:
        """The open file."""
        return self._path

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
            # The directory itself: a file beside the log could be deleted, and then locked twice.
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            self._lock_file = os.open(self._path.parent, flags)
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
        self._process = process_mark()
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()
        logger.info(
            "the access log goes on after record %d, %s", self._end.sequence, self._end.head
        )

    def stop(self) -> None:
        """Write what waits, and close the log; nothing in a copy of the process that writes it."""
        if self._thread is None or self._is_copied:
            return
        self._items.put(None)
        self._thread.join()
        self._thread = None
        self._close_files()
        logger.info("the access log ends with record %d, %s", self._end.sequence, self._end.head)

    def append(self, *, sync: bool = False, **fields: Any) -> Future[None]:
        """Queue a record, of the event `request` unless `fields` name another.

        The future is done once the record is written (and forced to the disk, with `sync` or when
        `sync_seconds` is 0), and holds an `AccessLogError` when it cannot be.
        """
        item = _Item({"event": "request", "time": _now(), **fields}, Future(), sync)
        item.written.set_running_or_notify_cancel()  # who waits may go away, the record stays
        if self._is_copied:
            item.written.set_exception(
                AccessLogError(
                    f"{self._path} is written by another process, which this one is a copy of: "
                    "start the service after the fork"
                )
            )
            return item.written
        try:
            self._items.put_nowait(item)
        except queue.Full:
            self._dropped += 1
            item.written.set_exception(AccessLogError("too many records wait for the disk"))
        return item.written

    @property
    def _is_copied(self) -> bool:
        """Whether the thread that writes is another process's."""
        return self._thread is not None and self._process != process_mark()

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
        self._end = end_of(self._path)
        self._open_file()
        if self._end.file == self._path:
            torn = self._end.torn
        else:
            torn = self._path.read_bytes()  # no whole line
            if self._end.file is not None:
                closed = self._end.file in files_of(self._path)
                self._continues = "full" if closed else "moved"
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
            self._write(records, sync=any(item.sync for item in batch))
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

    def _write(
        self, records: list[dict[str, Any]], before: bytes = b"", *, sync: bool = False
    ) -> None:
        """Append records, whole or not at all.

        Raises:
            OSError: when they are not written; the chain is then where it was, and what did reach
            the file is cut off by the next attempt.
        """
        self._look_at_file()
        disk = os.fstatvfs(self._file)
        tenth = disk.f_blocks * disk.f_frsize // 10
        if disk.f_bavail * disk.f_frsize < min(self._reserve_bytes, tenth):
            raise OSError(errno.ENOSPC, "the disk is full but for the reserve")
        if self._size >= self._file_bytes and not before:
            self._rotate()
        if self._continues == "moved" and self._size:
            before = b"\n"  # somebody else's file is in its place, and may end anywhere
        data, end = before, self._end
        if self._continues is not None:
            link = {"event": "continued", "time": _now(), "reason": self._continues}
            link |= {} if end.witness is None else end.witness.fields()
            # The marker of a torn line comes right after it.
            is_marker = bool(records) and records[0]["event"] == "recovered"
            records = [*records, link] if is_marker else [link, *records]
        for record in records:
            sequence = end.sequence + 1
            line, head = sealed(record | {"sequence": sequence, "previous": end.head})
            end = End(sequence, head, Witness.of(record) or end.witness)
            data += line
        written = 0
        while written < len(data):
            written += os.write(self._file, data[written:])
        if self._sync_seconds == 0 or sync:
            os.fsync(self._file)
        self._size += len(data)
        self._end, self._continues = end, None
        if self._sync_seconds > 0 and self._unsynced_since is None:
            self._unsynced_since = time.monotonic()

    def _look_at_file(self) -> None:
        """Go on in a new file when this one was moved away; notice when it was cut.

        Both are what programs do that rotate logs. The first record says so, and follows the last.
        """
        mine = os.fstat(self._file)
        if mine.st_size < self._size:
            self._continues = "cut"
            self._size = mine.st_size
            logger.warning("the access log was cut by another program; it goes on")
        elif self._failed:
            os.ftruncate(self._file, self._size)  # half a line that nobody was told of
        try:
            found = self._path.stat()
        except FileNotFoundError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != (mine.st_dev, mine.st_ino):
            os.fsync(self._file)
            self._begin_file("moved")
            logger.warning("the access log was moved away; it goes on in a new file")

    def _rotate(self) -> None:
        os.fsync(self._file)
        closed = [file for file in files_of(self._path) if file != self._path]
        number = 1 + (int(closed[-1].suffix[1:]) if closed else 0)
        self._path.rename(self._path.with_name(f"{self._path.name}.{number:06d}"))
        self._begin_file("full")
        logger.info(
            "the access log was rotated at record %d, %s", self._end.sequence, self._end.head
        )

    def _begin_file(self, reason: str) -> None:
        full = self._file
        self._open_file()
        os.close(full)
        self._continues = reason

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
