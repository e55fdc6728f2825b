"""What must survive a restart: tenants, API keys, limits, budgets and what the operator did.

One SQLite file, opened by the service and by `veilhead-server tenants` at the same time. Every
method is one transaction and blocks; the service calls them from threads of their own.

Write-ahead logging with `synchronous=NORMAL`: nothing is lost when the service or its machine's
software is killed. When the power fails, the charges of the last moments may be lost; the file
stays whole.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from veilhead_protocol.errors import StateError, TenantError
from veilhead_service.limits import Budget, Charge, Period, Usage
from veilhead_service.state_file import STATE_FILE, StateFile, advice, damaged
from veilhead_service.tenants import ApiKey, KeyScope, Tenant

#: What was used of a period is kept for so long after the period began, for those who look back
#: and for clocks that jump.
USAGE_DAYS: Final = 400

_DAY_SECONDS: Final = 86400.0
_PRUNED_AT_ONCE: Final = 1000


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
        raise StateError(advice(path, error)) from error


@dataclass(frozen=True)
class Ending:
    """Keys that were ended before their time, by one command.

    Attributes:
        epoch: 1 for the state's first one, and one more each time.
        token: random, so that two histories of a state are told apart.
        how: `revoked`, or `rotated` when they end after a grace period.
        tenant: whose they are.
        api_keys: their ids.
        ends: seconds since 1970 from which on they open nothing.
    """

    epoch: int
    token: str
    how: str
    tenant: str
    api_keys: tuple[str, ...]
    ends: float


@dataclass(frozen=True)
class Identity:
    """Which state this is, and what the access log is known to hold of it.

    Attributes:
        id: random, made with the state.
        logged_epoch: the last ending that is in the access log.
        log_sequence: number of a record of the access log that was on the disk; 0 for none.
        log_head: its hash.
    """

    id: str
    logged_epoch: int
    log_sequence: int
    log_head: str


class State(StateFile):
    """The store of tenants, keys and budgets."""

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def commands(self) -> int:
        """How many commands changed it so far."""
        with self._reported():
            return int(self._rows("SELECT coalesce(max(number), 0) FROM audit")[0][0])

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
            raise StateError(damaged(self._path)) from error

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
            others = self._rows(
                "SELECT id FROM api_keys WHERE tenant = ? AND revoked IS NULL "
                "AND (expires IS NULL OR expires > ?)",
                key.tenant,
                others_end,
            )
            self._end("rotated", key.tenant, [found for (found,) in others], others_end)
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
            self._end("revoked", tenant, ids, self._clock())
            for found in ids:
                self._note("revoke", tenant, f"key {found}")
            return ids

    def _end(self, how: str, tenant: str, ids: list[str], ends: float) -> None:
        if not ids:
            return
        epoch = 1 + self._rows("SELECT coalesce(max(epoch), 0) FROM endings")[0][0]
        token = secrets.token_hex(8)
        self._apply(Ending(epoch, token, how, tenant, tuple(ids), ends))

    def _apply(self, ending: Ending) -> list[str]:
        """End keys and note it; the ids of those that had not ended by then."""
        self._database.execute(
            "INSERT INTO endings (epoch, token, how, tenant, api_keys, ends) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (
                ending.epoch,
                ending.token,
                ending.how,
                ending.tenant,
                " ".join(ending.api_keys),
                ending.ends,
            ),
        )
        change = "revoked = ?1" if ending.how == "revoked" else "expires = ?1"
        return [
            found
            for found in ending.api_keys
            if self._database.execute(
                f"UPDATE api_keys SET {change} WHERE id = ?2 AND revoked IS NULL "  # noqa: S608
                "AND (?3 = 'revoked' OR expires IS NULL OR expires > ?1)",
                (ending.ends, found, ending.how),
            ).rowcount
        ]

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

    # --- what the access log must know ------------------------------------------------------------

    def identity(self) -> Identity:
        """Which state this is."""
        with self._reported():
            ((*found,),) = self._rows(
                "SELECT id, logged_epoch, log_sequence, log_head FROM identity"
            )
        return Identity(*found)

    def endings(self, after: int = 0) -> list[Ending]:
        """Commands that ended keys, beyond this epoch, in order."""
        with self._reported():
            rows = self._rows(
                "SELECT epoch, token, how, tenant, api_keys, ends FROM endings "
                "WHERE epoch > ? ORDER BY epoch",
                after,
            )
        return [
            Ending(epoch, token, how, tenant, tuple(ids.split()), ends)
            for epoch, token, how, tenant, ids, ends in rows
        ]

    def note_logged(self, epoch: int, sequence: int, head: str) -> None:
        """Note that the access log holds all endings up to `epoch`, and has this record."""
        with self._reported(), self._writing():
            self._database.execute(
                "UPDATE identity SET logged_epoch = ?, log_sequence = ?, log_head = ?",
                (epoch, sequence, head),
            )

    def accept(self, endings: Iterable[Ending], identity: Identity) -> list[str]:
        """Become the state that the access log knows: end what that says has ended.

        Endings of this state that the log does not know are kept, and numbered after the others.

        Args:
            endings: all that the log knows, in order.
            identity: what this state is from now on.

        Returns:
            Ids of keys that had not ended before.
        """
        given = list(endings)
        with self._reported(), self._writing():
            tokens = {ending.token for ending in given}
            own = [ending for ending in self.endings() if ending.token not in tokens]
            self._database.execute("DELETE FROM endings")
            ended = [found for ending in given for found in self._apply(ending)]
            epoch = max((ending.epoch for ending in given), default=0)
            for number, ending in enumerate(own, epoch + 1):
                self._apply(replace(ending, epoch=number))
            self._database.execute(
                "UPDATE identity SET id = ?, logged_epoch = ?, log_sequence = ?, log_head = ?",
                (
                    identity.id,
                    identity.logged_epoch,
                    identity.log_sequence,
                    identity.log_head,
                ),
            )
            self._note("accept-restored", "", f"keys ended again: {' '.join(ended) or 'none'}")
        return ended

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
        starts = {period: period.start(now) for period in Period}
        # The tenant's own rows are found by the primary key, all tenants' by the index of starts.
        whose = "" if tenant is None else "AND tenant = ?"
        mine = () if tenant is None else (tenant,)
        with self._reported():
            used = {
                (owner, model, start): units
                for owner, model, start, units in self._rows(
                    "SELECT tenant, model, start, used FROM usage "  # noqa: S608
                    f"WHERE start IN (?, ?) {whose}",
                    *starts.values(),
                    *mine,
                )
            }
            own = self.budgets()
        pairs = {(owner, model) for owner, model, _ in used}
        pairs |= {pair for pair in own if tenant in (None, pair[0])}
        found = []
        for owner, model in sorted(pairs):
            budget = own.get((owner, model)) or defaults.get(model, default)
            units = used.get((owner, model, starts[budget.period]), 0)
            found.append(Usage(owner, model, budget, units, budget.period.ends(now)))
        return found

    def prune(self) -> bool:
        """Delete some of the oldest counts; whether there may be more of them.

        What was used of a period goes `USAGE_DAYS` after the period began.
        """
        oldest = datetime.fromtimestamp(self._clock() - USAGE_DAYS * _DAY_SECONDS, UTC)
        with self._reported(), self._writing():
            done = self._database.execute(
                "DELETE FROM usage WHERE (tenant, model, start) IN "
                "(SELECT tenant, model, start FROM usage WHERE start < ? LIMIT ?)",
                (oldest.strftime("%Y-%m-%d"), _PRUNED_AT_ONCE),
            )
        return done.rowcount == _PRUNED_AT_ONCE

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
