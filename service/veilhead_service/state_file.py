"""The file of the state: how it is opened, migrated, locked, and known to be still the same one.

SQLite keeps a file open by its number, not by its name. A file that somebody moves away, deletes or
writes over under a running service therefore goes on being read as it was, and what
`veilhead-server tenants` writes into the one that has taken its place is never seen. So the service
asks again and again whether the file at the path, and the two beside it, are those that it opened.

The file itself changes only when the write-ahead log is copied into it. No connection does that by
itself: `checkpoint` does, and notes what the file then looks like. Whoever else writes to the file
leaves it looking differently.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from veilhead_protocol.copies import keep_for_ever, process_mark
from veilhead_protocol.errors import StateError

STATE_FILE: Final = "state.sqlite3"

#: Nobody waits longer than this for a lock of another process.
BUSY_SECONDS: Final = 5.0

#: The write-ahead log is copied into the file after so many transactions: some megabytes.
_TRANSACTIONS: Final = 1000

#: Why nothing is done in a copy of the process that opened the state.
COPIED: Final = (
    "was opened by another process, which this one is a copy of: start the service after the fork"
)

#: What the note says while a checkpoint is made, or when it was not finished.
_UNKNOWN: Final = "unknown"

#: A checkpoint may come between the look at the note and that at the file.
_LOOKS: Final = 3

#: Migration n takes a file from version n to n + 1. They are never changed, only added to.
MIGRATIONS: Final = (
    """
    CREATE TABLE tenants (
        name TEXT PRIMARY KEY,
        created REAL NOT NULL
    ) STRICT;
    CREATE TABLE api_keys (
        id TEXT PRIMARY KEY,
        tenant TEXT NOT NULL REFERENCES tenants (name),
        secret_sha256 BLOB NOT NULL CHECK (length(secret_sha256) = 32),
        scopes TEXT NOT NULL,
        created REAL NOT NULL,
        expires REAL,
        revoked REAL
    ) STRICT;
    CREATE INDEX api_keys_of_tenant ON api_keys (tenant);
    CREATE TABLE audit (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        action TEXT NOT NULL,
        tenant TEXT NOT NULL,
        detail TEXT NOT NULL
    ) STRICT
    """,
    """
    ALTER TABLE tenants ADD COLUMN rate_per_second REAL CHECK (rate_per_second > 0);
    ALTER TABLE tenants ADD COLUMN burst INTEGER CHECK (burst >= 1);
    CREATE TABLE budgets (
        tenant TEXT NOT NULL REFERENCES tenants (name),
        model TEXT NOT NULL,
        units INTEGER CHECK (units >= 0),
        period TEXT NOT NULL CHECK (period IN ('day', 'month')),
        PRIMARY KEY (tenant, model)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE usage (
        tenant TEXT NOT NULL REFERENCES tenants (name),
        model TEXT NOT NULL,
        start TEXT NOT NULL,
        used INTEGER NOT NULL CHECK (used >= 0),
        PRIMARY KEY (tenant, model, start)
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE identity (
        only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
        id TEXT NOT NULL,
        looks TEXT NOT NULL,
        logged_epoch INTEGER NOT NULL,
        log_sequence INTEGER NOT NULL,
        log_head TEXT NOT NULL
    ) STRICT;
    INSERT INTO identity VALUES (1, lower(hex(randomblob(16))), '', 0, 0, '');
    CREATE TABLE endings (
        epoch INTEGER PRIMARY KEY,
        token TEXT NOT NULL,
        how TEXT NOT NULL CHECK (how IN ('revoked', 'rotated')),
        tenant TEXT NOT NULL,
        api_keys TEXT NOT NULL,
        ends REAL NOT NULL
    ) STRICT;
    INSERT INTO endings (epoch, token, how, tenant, api_keys, ends)
        SELECT row_number() OVER (ORDER BY revoked, id), lower(hex(randomblob(8))), 'revoked',
            tenant, id, revoked
        FROM api_keys WHERE revoked IS NOT NULL;
    CREATE INDEX usage_by_start ON usage (start, tenant, model)
    """,
)


class StateFile:
    """One connection to the file; one thread at a time uses it."""

    def __init__(
        self,
        directory: Path,
        *,
        clock: Callable[[], float] = time.time,
        beside: bool = False,
    ) -> None:
        """Open the state in `directory`, making or migrating it as needed.

        Args:
            directory: private to its owner; made when it is absent.
            clock: seconds since 1970.
            beside: this process has another connection to it, which looked it through.

        Raises:
            StateError: when the file is not one, is damaged, or is of a newer version.
        """
        self._path = directory / STATE_FILE
        self._clock = clock
        self._process = process_mark()
        self._opened_as: tuple[tuple[int, int], ...] = ()
        self._transactions = 0
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._path.exists():
                # SQLite gives its side files the mode of this one. A file that is there is never
                # opened by other means than SQLite's: closing it would drop the locks of every
                # connection that this process has (https://sqlite.org/howtocorrupt.html, 2.2).
                os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise StateError(
                f"the state {self._path} cannot be opened ({error.strerror}): it needs a "
                "directory that this user can write to"
            ) from error
        with self._reported():
            # One thread at a time uses it, which need not be the one that opens it.
            self._database = sqlite3.connect(
                self._path,
                timeout=BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                self._prepare(beside=beside)
            except BaseException:
                self._database.close()
                raise

    def close(self) -> None:
        """Close the file."""
        # https://www.sqlite.org/howtocorrupt.html: not even closed in another process. And SQLite
        # would delete, by its name, the log of what has taken this file's place. Such a connection
        # ends with the process, without any of its doing.
        is_copied = self._process != process_mark()
        if is_copied or (self._opened_as and self._side_file_is_anothers()):
            keep_for_ever(self._database)
            return
        self._database.close()

    # --- opening ----------------------------------------------------------------------------------

    def _prepare(self, *, beside: bool) -> None:
        self._database.execute("PRAGMA foreign_keys = ON")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("PRAGMA wal_autocheckpoint = 0")
        if beside:
            return
        if int(self._rows("PRAGMA user_version")[0][0]) != len(MIGRATIONS):
            with self._writing():
                for migration in MIGRATIONS[self._checked_version() :]:
                    for statement in migration.split(";"):
                        self._database.execute(statement)
                self._database.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        self._checked_version()
        self._use_write_ahead_log()

    def _checked_version(self) -> int:
        """The file's version, once it is known to be a whole state of a version known here."""
        version = int(self._rows("PRAGMA user_version")[0][0])
        if version > len(MIGRATIONS):
            raise StateError(
                f"the state {self._path} has schema version {version}, this program knows "
                f"up to {len(MIGRATIONS)}: use the newer program that wrote it"
            )
        if version == 0 and self._rows("SELECT 1 FROM sqlite_master LIMIT 1"):
            raise StateError(
                f"{self._path} is a database of something else: choose another directory"
            )
        if version and self._rows("PRAGMA quick_check(1)") != [("ok",)]:
            raise StateError(damaged(self._path))
        return version

    def _use_write_ahead_log(self) -> None:
        """Switch once in the life of a file; this one statement does not wait for other users."""
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self._database.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return

    # --- is it still the same? --------------------------------------------------------------------

    def adopt(self) -> None:
        """Take the file as it is now for the one that `check_whole` compares with.

        Raises:
            StateError: when the state cannot be read; so do all methods below.
        """
        with self._reported():
            self._note_looks(self._looks())
        self._opened_as = tuple(_number(path) for path in self._files())

    def check_whole(self) -> bool:
        """See that the file at the path is the one that was adopted, and that nobody wrote over it.

        False when that cannot be said before the next checkpoint, since one was not finished.

        Raises:
            StateError: saying what happened to it, and what to do.
        """
        # Of several connections of one process, the one that adopted it looks.
        for path, number in zip(self._files(), self._opened_as, strict=False):
            if _number(path) != number:
                happened = "was replaced" if path.exists() else "is gone"
                raise StateError(
                    f"{path} {happened} while the service ran: put back the same file, or stop "
                    "the service and restore the state as docs/operations/tenants.md says"
                )
        for _ in range(_LOOKS):
            with self._reported():
                noted = self._rows("SELECT looks FROM identity")[0][0]
            if noted in (self._looks(), _UNKNOWN):
                return bool(noted != _UNKNOWN)
            time.sleep(0.01)
        raise StateError(
            f"{self._path} was written over by another program while the service ran: stop the "
            "service and restore the state as docs/operations/tenants.md says"
        )

    @property
    def needs_checkpoint(self) -> bool:
        """Whether this connection has written much since its last checkpoint."""
        return self._transactions >= _TRANSACTIONS

    def checkpoint(self) -> None:
        """Copy the write-ahead log into the file, when that is whole."""
        self.check_whole()
        with self._reported():
            self._note_looks(_UNKNOWN)
            self._rows("PRAGMA wal_checkpoint(PASSIVE)")
            self._note_looks(self._looks())

    def forget_transactions(self) -> None:
        """Count anew: what this connection wrote is in the file."""
        self._transactions = 0

    def _note_looks(self, looks: str) -> None:
        with self._writing():
            self._database.execute("UPDATE identity SET looks = ?", (looks,))

    def _looks(self) -> str:
        try:
            found = self._path.stat()
        except OSError:
            return "absent"
        return f"{found.st_size} {found.st_mtime_ns}"

    def _files(self) -> list[Path]:
        """The file, its write-ahead log and the index of that."""
        return [self._path, *(Path(f"{self._path}{end}") for end in ("-wal", "-shm"))]

    def _side_file_is_anothers(self) -> bool:
        main, log, _ = self._files()
        moved = _number(main) != self._opened_as[0]
        return log.exists() and (moved or _number(log) != self._opened_as[1])

    # --- statements -------------------------------------------------------------------------------

    def wait_at_most(self, seconds: float) -> None:
        """How long the statements that follow wait for a lock of somebody else."""
        with self._reported():
            self._database.execute(f"PRAGMA busy_timeout = {max(0, int(seconds * 1e3))}")

    def data_version(self) -> int:
        """A number that changes when another connection has written."""
        with self._reported():
            return int(self._rows("PRAGMA data_version")[0][0])

    def _rows(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._database.execute(statement, values).fetchall()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        if self._process != process_mark():
            raise StateError(f"the state {self._path} {COPIED}")
        try:
            yield
        except sqlite3.Error as error:
            raise StateError(advice(self._path, error)) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction, which no other writer's can come between."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
            self._transactions += 1
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise


def _number(path: Path) -> tuple[int, int]:
    """What a path leads to: device and inode, (0, 0) when it leads to nothing."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino


def damaged(path: Path) -> str:
    """What to say of a file that is."""
    return f"the state {path} is damaged: restore it from a backup, or start anew in another place"


def locked(path: Path) -> str:
    """What to say of a file that another process holds too long."""
    return f"the state {path} is locked by another process for {BUSY_SECONDS:.0f} s: try again"


def advice(path: Path, error: sqlite3.Error) -> str:
    """What went wrong in SQLite, and what to do. Its own messages hold no values."""
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return locked(path)
    if name.startswith("SQLITE_FULL"):
        return f"the state {path} cannot grow: make room on its disk"
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return f"the state {path} cannot be written: check its owner and permissions"
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return damaged(path)
    return f"the state {path} failed ({name or type(error).__name__}): check its disk"
