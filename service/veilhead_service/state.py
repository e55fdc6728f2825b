"""What must survive a restart: tenants, API keys, limits, budgets and what the operator did.

One SQLite file, opened by the service and by `veilhead-server tenants` at the same time. Every
method is one transaction and blocks; the service calls them from a thread of their own.

Write-ahead logging with `synchronous=NORMAL`: nothing is lost when the service or its machine's
software is killed. When the power fails, the charges of the last moments may be lost; the file
stays whole.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from veilhead_protocol.copies import keep_for_ever, process_mark
from veilhead_protocol.errors import StateError, TenantError
from veilhead_service.limits import Budget, Charge, Period, Usage
from veilhead_service.tenants import ApiKey, KeyScope, Tenant

STATE_FILE: Final = "state.sqlite3"

_BUSY_SECONDS: Final = 5.0

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
)


@dataclass(frozen=True)
class AuditEntry:
    """One thing that an operator did. Seconds since 1970, and no secret."""

    at: float
    action: str
    tenant: str
    detail: str


def has_tenants(directory: Path) -> bool:
    """Whether any tenant was ever made in this state; a state that is not there has none.

    Nothing is migrated or changed.

    Raises:
        StateError: when it is there and cannot be read.
    """
    path = directory / STATE_FILE
    if not path.exists():
        return False
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            return database.execute("SELECT 1 FROM tenants LIMIT 1").fetchone() is not None
    except sqlite3.Error as error:
        raise StateError(_advice(path, error)) from error


class State:
    """The store of tenants, keys and budgets."""

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Open the state in `directory`, making or migrating it as needed.

        Args:
            directory: private to its owner; made when it is absent.
            clock: seconds since 1970.

        Raises:
            StateError: when the file is not one, is damaged, or is of a newer version.
        """
        self._path = directory / STATE_FILE
        self._clock = clock
        self._process = process_mark()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite gives its side files the mode of this one.
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
                timeout=_BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                self._prepare()
            except BaseException:
                self._database.close()
                raise

    def close(self) -> None:
        """Close the file."""
        if self._process != process_mark():
            # https://www.sqlite.org/howtocorrupt.html: not even closed in another process.
            keep_for_ever(self._database)
            return
        self._database.close()

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the file ---------------------------------------------------------------------------------

    def _prepare(self) -> None:
        self._database.execute("PRAGMA foreign_keys = ON")
        self._database.execute("PRAGMA synchronous = NORMAL")
        with self._writing():
            version = self._version()
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
                raise StateError(_damaged(self._path))
            for migration in MIGRATIONS[version:]:
                for statement in migration.split(";"):
                    self._database.execute(statement)
            self._database.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        self._use_write_ahead_log()

    def _use_write_ahead_log(self) -> None:
        """Switch once in the life of a file; this one statement does not wait for other users."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._database.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return

    def _version(self) -> int:
        return int(self._rows("PRAGMA user_version")[0][0])

    def _rows(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._database.execute(statement, values).fetchall()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        if self._process != process_mark():
            raise StateError(
                f"the state {self._path} was opened by another process, which this one is a copy "
                "of: start the service after the fork"
            )
        try:
            yield
        except sqlite3.Error as error:
            raise StateError(_advice(self._path, error)) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction, which no other writer's can come between."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def data_version(self) -> int:
        """A number that changes when another connection has written.

        Raises:
            StateError: when the state cannot be read; so do all methods below.
        """
        with self._reported():
            return int(self._rows("PRAGMA data_version")[0][0])

    # --- tenants and keys -------------------------------------------------------------------------

    def tenants(self) -> list[Tenant]:
        """All tenants, by name."""
        with self._reported():
            rows = self._rows(
                "SELECT name, created, rate_per_second, burst FROM tenants ORDER BY name"
            )
        return [Tenant(*row) for row in rows]

    def api_keys(self) -> list[ApiKey]:
        """All API keys, oldest first."""
        with self._reported():
            rows = self._rows(
                "SELECT id, tenant, secret_sha256, scopes, created, expires, revoked "
                "FROM api_keys ORDER BY created, rowid"
            )
        try:
            return [
                ApiKey(key_id, tenant, digest, _scopes(scopes), *times)
                for key_id, tenant, digest, scopes, *times in rows
            ]
        except ValueError as error:  # a scope that this version does not know
            raise StateError(_damaged(self._path)) from error

    def add_tenant(self, key: ApiKey) -> None:
        """A new tenant with its first key.

        Raises:
            TenantError: when there is a tenant of this name.
        """
        with self._reported(), self._writing():
            if self._rows("SELECT 1 FROM tenants WHERE name = ?", key.tenant):
                raise TenantError(
                    f"there is a tenant {key.tenant} already: `rotate` gives it a new key"
                )
            self._database.execute(
                "INSERT INTO tenants (name, created) VALUES (?, ?)", (key.tenant, key.created)
            )
            self._insert(key)
            self._note("add", key.tenant, f"key {key.id}, scopes {_written(key.scopes)}")

    def rotate(self, key: ApiKey, *, others_end: float) -> None:
        """Give a tenant a new key; its active others end at `others_end`, if not before.

        Raises:
            TenantError: when there is no such tenant.
        """
        with self._reported(), self._writing():
            self._check_tenant(key.tenant)
            self._database.execute(
                "UPDATE api_keys SET expires = min(coalesce(expires, ?1), ?1) "
                "WHERE tenant = ?2 AND revoked IS NULL",
                (others_end, key.tenant),
            )
            self._insert(key)
            self._note("rotate", key.tenant, f"key {key.id}, scopes {_written(key.scopes)}")

    def revoke(self, tenant: str, key_id: str | None) -> list[str]:
        """Revoke a tenant's key, or all its keys when `key_id` is None; the ids that were not yet.

        Raises:
            TenantError: when there is no such tenant, or the key is not its.
        """
        with self._reported(), self._writing():
            self._check_tenant(tenant)
            rows = self._rows("SELECT id, revoked FROM api_keys WHERE tenant = ?", tenant)
            if key_id is not None:
                rows = [row for row in rows if row[0] == key_id]
                if not rows:
                    raise TenantError(f"{tenant} has no such key: `list` shows the ids of its keys")
            ids = [found for found, revoked in rows if revoked is None]
            for found in ids:
                self._database.execute(
                    "UPDATE api_keys SET revoked = ? WHERE id = ?", (self._clock(), found)
                )
                self._note("revoke", tenant, f"key {found}")
            return ids

    def _check_tenant(self, name: str) -> None:
        if not self._rows("SELECT 1 FROM tenants WHERE name = ?", name):
            raise TenantError("there is no such tenant: `list` shows those that are")

    def _insert(self, key: ApiKey) -> None:
        self._database.execute(
            "INSERT INTO api_keys (id, tenant, secret_sha256, scopes, created, expires) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (
                key.id,
                key.tenant,
                key.secret_digest,
                _written(key.scopes),
                key.created,
                key.expires,
            ),
        )

    # --- limits -----------------------------------------------------------------------------------

    def set_rate(self, tenant: str, rate_per_second: float | None, burst: int | None) -> None:
        """Give a tenant a rate of its own; None leaves what was.

        Raises:
            TenantError: when there is no such tenant.
        """
        with self._reported(), self._writing():
            self._check_tenant(tenant)
            self._database.execute(
                "UPDATE tenants SET rate_per_second = coalesce(?, rate_per_second), "
                "burst = coalesce(?, burst) WHERE name = ?",
                (rate_per_second, burst, tenant),
            )
            self._note("limit", tenant, f"rate {rate_per_second}, burst {burst}")

    def set_budget(self, tenant: str, model: str, budget: Budget) -> None:
        """Set a tenant's budget of a model. What it used of the period stays used.

        Raises:
            TenantError: when there is no such tenant.
        """
        with self._reported(), self._writing():
            self._check_tenant(tenant)
            self._database.execute(
                "INSERT INTO budgets (tenant, model, units, period) VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET units = excluded.units, period = excluded.period",
                (tenant, model, budget.units, budget.period.value),
            )
            self._note("limit", tenant, f"{model}: {budget.units} a {budget.period}")

    def budgets(self) -> dict[tuple[str, str], Budget]:
        """The budgets that differ from the service's default, by tenant and model."""
        with self._reported():
            rows = self._rows("SELECT tenant, model, units, period FROM budgets")
        return {
            (tenant, model): Budget(units, Period(period)) for tenant, model, units, period in rows
        }

    def charge(self, tenant: str, model: str, units: int, default: Budget) -> Charge | Usage:
        """Take units from a budget, or say how it stands when they are not there.

        The look and the taking are one transaction: no number of callers passes a budget.
        """
        now = self._clock()
        with self._reported(), self._writing():
            budget = self._budget(tenant, model, default)
            start = budget.period.start(now)
            used = self._used(tenant, model, start)
            if budget.units is not None and used + units > budget.units:
                return Usage(tenant, model, budget, used, budget.period.ends(now))
            self._database.execute(
                "INSERT INTO usage (tenant, model, start, used) VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET used = used + excluded.used",
                (tenant, model, start, units),
            )
        return Charge(tenant, model, start, units)

    def refund(self, charge: Charge) -> None:
        """Give back what was charged, to the period that it was taken from."""
        with self._reported(), self._writing():
            self._database.execute(
                "UPDATE usage SET used = max(0, used - ?) "
                "WHERE tenant = ? AND model = ? AND start = ?",
                (charge.units, charge.tenant, charge.model, charge.start),
            )

    def usage(
        self,
        default: Budget,
        *,
        tenant: str | None = None,
        of_models: Mapping[str, Budget] | None = None,
    ) -> list[Usage]:
        """The current period of every budget that is set or in use, by tenant and model.

        Args:
            default: the budget of a model that has none of its own.
            tenant: only this tenant's.
            of_models: the budgets of models that have one by their policy.
        """
        defaults = of_models or {}
        now = self._clock()
        with self._reported():
            pairs = self._rows(
                "SELECT tenant, model FROM budgets UNION SELECT tenant, model FROM usage "
                "WHERE start IN (?, ?) ORDER BY 1, 2",
                Period.DAY.start(now),
                Period.MONTH.start(now),
            )
            found = []
            for owner, model in pairs:
                if tenant in (None, owner):
                    budget = self._budget(owner, model, defaults.get(model, default))
                    used = self._used(owner, model, budget.period.start(now))
                    found.append(Usage(owner, model, budget, used, budget.period.ends(now)))
        return found

    def _budget(self, tenant: str, model: str, default: Budget) -> Budget:
        rows = self._rows(
            "SELECT units, period FROM budgets WHERE tenant = ? AND model = ?", tenant, model
        )
        return Budget(rows[0][0], Period(rows[0][1])) if rows else default

    def _used(self, tenant: str, model: str, start: str) -> int:
        rows = self._rows(
            "SELECT used FROM usage WHERE tenant = ? AND model = ? AND start = ?",
            tenant,
            model,
            start,
        )
        return int(rows[0][0]) if rows else 0

    # --- audit ------------------------------------------------------------------------------------

    def audit(self) -> list[AuditEntry]:
        """What operators did, oldest first."""
        with self._reported():
            return [
                AuditEntry(*row)
                for row in self._rows(
                    "SELECT at, action, tenant, detail FROM audit ORDER BY number"
                )
            ]

    def _note(self, action: str, tenant: str, detail: str) -> None:
        self._database.execute(
            "INSERT INTO audit (at, action, tenant, detail) VALUES (?, ?, ?, ?)",
            (self._clock(), action, tenant, detail),
        )


def _written(scopes: frozenset[KeyScope]) -> str:
    return " ".join(sorted(scopes))


def _scopes(written: str) -> frozenset[KeyScope]:
    return frozenset(KeyScope(scope) for scope in written.split())


def _damaged(path: Path) -> str:
    return f"the state {path} is damaged: restore it from a backup, or start anew in another place"


def _advice(path: Path, error: sqlite3.Error) -> str:
    """What went wrong in SQLite, and what to do. Its own messages hold no values."""
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return f"the state {path} is locked by another process for {_BUSY_SECONDS:.0f} s: try again"
    if name.startswith("SQLITE_FULL"):
        return f"the state {path} cannot grow: make room on its disk"
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return f"the state {path} cannot be written: check its owner and permissions"
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return _damaged(path)
    return f"the state {path} failed ({name or type(error).__name__}): check its disk"
