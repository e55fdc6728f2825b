"""The state: migrations, damage, other users, and money that is not lost."""

from __future__ import annotations

import sqlite3
import threading
from datetime import UTC, datetime

import pytest

from veilhead_protocol.errors import StateError, TenantError
from veilhead_service import state_file
from veilhead_service.limits import Budget, Charge, Period, Usage
from veilhead_service.state import State
from veilhead_service.state_file import MIGRATIONS, STATE_FILE
from veilhead_service.tenants import DEFAULT_SCOPES, KeyScope, new_api_key

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC).timestamp()
DAY = 86400.0
NO_LIMIT = Budget(None, Period.DAY)


class Clock:
    def __init__(self):
        self.now = NOON

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def state(tmp_path, clock):
    with State(tmp_path, clock=clock) as opened:
        opened.add_tenant(a_key("clinic"))
        yield opened


def a_key(tenant, *, now=NOON, expires=None, scopes=DEFAULT_SCOPES):
    return new_api_key(tenant, scopes, now=now, expires=expires)[0]


def used(state, tenant="clinic", model="m"):
    return {(row.tenant, row.model): row.used for row in state.usage(NO_LIMIT)}[tenant, model]


# --- the file -----------------------------------------------------------------------------------


def test_what_was_written_is_there_after_a_restart(tmp_path, state):
    state.set_rate("clinic", 2.5, 7)
    state.set_budget("clinic", "m", Budget(10, Period.MONTH))
    state.charge("clinic", "m", 3, NO_LIMIT)
    before = (state.tenants(), state.api_keys(), state.budgets(), used(state), state.audit())
    state.close()
    with State(tmp_path, clock=lambda: NOON) as again:
        assert before == (
            again.tenants(),
            again.api_keys(),
            again.budgets(),
            used(again),
            again.audit(),
        )
    assert before[3] == 3
    assert [entry.action for entry in before[4]] == ["add", "limit", "limit"]


def test_it_is_for_its_owner_alone(tmp_path):
    with State(tmp_path / "new" / "state") as opened:
        opened.add_tenant(a_key("clinic"))
        files = list((tmp_path / "new" / "state").iterdir())
        assert len(files) == 3  # write-ahead log and its index
        assert all(file.stat().st_mode & 0o077 == 0 for file in files)
    assert (tmp_path / "new" / "state").stat().st_mode & 0o077 == 0


def test_a_state_of_the_first_schema_is_migrated(tmp_path):
    key = a_key("clinic")
    old = sqlite3.connect(tmp_path / STATE_FILE)
    old.executescript(MIGRATIONS[0] + "; PRAGMA user_version = 1")
    old.execute("INSERT INTO tenants (name, created) VALUES ('clinic', ?)", (NOON,))
    old.execute(
        "INSERT INTO api_keys (id, tenant, secret_sha256, scopes, created) VALUES (?, ?, ?, ?, ?)",
        (key.id, "clinic", key.secret_digest, "infer models usage", NOON),
    )
    old.commit()
    old.close()
    with State(tmp_path) as state:
        assert state.api_keys() == [key]
        (tenant,) = state.tenants()
        assert (tenant.name, tenant.rate_per_second, tenant.burst) == ("clinic", None, None)
        assert isinstance(state.charge("clinic", "m", 1, NO_LIMIT), Charge)
    database = sqlite3.connect(tmp_path / STATE_FILE)
    assert database.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()


def test_a_migration_that_fails_changes_nothing(tmp_path, monkeypatch):
    with State(tmp_path) as state:
        state.add_tenant(a_key("clinic"))
    broken = "CREATE TABLE more (x INTEGER) STRICT; INSERT INTO absent VALUES (1)"
    monkeypatch.setattr(state_file, "MIGRATIONS", (*MIGRATIONS, broken))
    with pytest.raises(StateError):
        State(tmp_path)
    monkeypatch.undo()
    with State(tmp_path) as state:
        assert [tenant.name for tenant in state.tenants()] == ["clinic"]
        assert state._rows("SELECT * FROM sqlite_master WHERE name = 'more'") == []


def test_a_newer_schema_is_refused_and_left_alone(tmp_path):
    State(tmp_path).close()
    database = sqlite3.connect(tmp_path / STATE_FILE)
    database.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    database.close()
    with pytest.raises(StateError, match="newer program"):
        State(tmp_path)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / STATE_FILE).write_bytes(b"not a database, " * 1000)
    with pytest.raises(StateError, match="restore it from a backup"):
        State(tmp_path)


def test_a_damaged_file_is_refused(tmp_path):
    with State(tmp_path) as state:
        for number in range(200):
            state.add_tenant(a_key(f"tenant-{number}"))
    content = bytearray((tmp_path / STATE_FILE).read_bytes())
    content[4096:12288] = b"\xff" * 8192
    (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(StateError, match="damaged"):
        State(tmp_path)


def test_another_programs_database_is_left_alone(tmp_path):
    database = sqlite3.connect(tmp_path / STATE_FILE)
    database.execute("CREATE TABLE recipes (x)")
    database.close()
    with pytest.raises(StateError, match="something else"):
        State(tmp_path)
    database = sqlite3.connect(tmp_path / STATE_FILE)
    assert database.execute("SELECT name FROM sqlite_master").fetchall() == [("recipes",)]
    database.close()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be opened"):
        State(tmp_path / "file")


def test_a_full_disk_charges_nothing_and_says_so(state):
    """SQLite's own page limit fails a write as a full disk does."""
    pages = state._rows("PRAGMA page_count")[0][0]
    state._rows(f"PRAGMA max_page_count = {pages}")

    def fill():
        for number in range(10_000):
            state.charge("clinic", f"model-{number}", 1, NO_LIMIT)

    with pytest.raises(StateError, match="make room"):
        fill()
    rows = len(state.usage(NO_LIMIT))
    with pytest.raises(StateError):
        state.charge("clinic", "x" * 10_000, 1, NO_LIMIT)
    assert len(state.usage(NO_LIMIT)) == rows
    state._rows("PRAGMA max_page_count = 1000000")
    assert isinstance(state.charge("clinic", "x" * 10_000, 1, NO_LIMIT), Charge)


def test_a_lock_that_does_not_end_is_named(tmp_path, state, monkeypatch):
    state._rows("PRAGMA busy_timeout = 20")
    other = sqlite3.connect(tmp_path / STATE_FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StateError, match="locked by another"):
        state.charge("clinic", "m", 1, NO_LIMIT)
    assert state.tenants()  # reading goes on
    other.execute("ROLLBACK")
    other.close()
    assert isinstance(state.charge("clinic", "m", 1, NO_LIMIT), Charge)


def test_many_open_a_new_state_at_once(tmp_path):
    errors = []

    def work(number):
        try:
            with State(tmp_path) as state:
                state.add_tenant(a_key(f"t{number}"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with State(tmp_path) as state:
        assert len(state.tenants()) == 8


def test_the_data_version_tells_what_others_wrote_and_only_that(tmp_path, state):
    first = state.data_version()
    state.charge("clinic", "m", 1, NO_LIMIT)
    assert state.data_version() == first
    with State(tmp_path) as other:
        other.set_rate("clinic", 1.0, None)
    assert state.data_version() != first


# --- tenants and keys ---------------------------------------------------------------------------


def test_a_name_is_one_tenants(state):
    with pytest.raises(TenantError, match="already"):
        state.add_tenant(a_key("clinic"))
    assert len(state.api_keys()) == 1


def test_rotation_ends_the_others_and_never_later_than_before(state):
    (first,) = state.api_keys()
    state.rotate(a_key("clinic", now=NOON + 1, expires=NOON + 5), others_end=NOON + 100)
    state.rotate(a_key("clinic", now=NOON + 2), others_end=NOON + 50)
    ends = [key.expires for key in state.api_keys()]
    assert ends == [NOON + 50, NOON + 5, None]
    assert state.api_keys()[0].id == first.id


def test_revocation_is_of_one_key_or_of_all(state):
    second = a_key("clinic", now=NOON + 1, scopes=frozenset({KeyScope.METRICS}))
    state.rotate(second, others_end=NOON + 100)
    assert state.revoke("clinic", second.id) == [second.id]
    assert [key.status(NOON + 2) for key in state.api_keys()] == ["active", "revoked"]
    assert len(state.revoke("clinic", None)) == 1
    assert state.revoke("clinic", None) == []


def test_a_key_is_revoked_under_its_own_tenant_only(state):
    other = a_key("bank")
    state.add_tenant(other)
    with pytest.raises(TenantError, match="no such key"):
        state.revoke("clinic", other.id)
    assert all(key.revoked is None for key in state.api_keys())


@pytest.mark.parametrize(
    "act",
    [
        lambda state: state.revoke("absent", None),
        lambda state: state.rotate(a_key("absent"), others_end=NOON),
        lambda state: state.set_rate("absent", 1.0, 1),
        lambda state: state.set_budget("absent", "m", Budget(1, Period.DAY)),
    ],
    ids=["revoke", "rotate", "rate", "budget"],
)
def test_an_unknown_tenant_is_an_error_and_leaves_no_trace(state, act):
    before = state.audit()
    with pytest.raises(TenantError, match="no such tenant"):
        act(state)
    assert (state.audit(), len(state.api_keys())) == (before, 1)


# --- budgets ------------------------------------------------------------------------------------


def test_a_budget_ends_exactly_and_what_does_not_fit_is_not_taken(state):
    budget = Budget(10, Period.DAY)
    assert isinstance(state.charge("clinic", "m", 8, budget), Charge)
    refused = state.charge("clinic", "m", 3, budget)
    assert refused == Usage("clinic", "m", budget, 8, NOON + DAY / 2)
    assert refused.remaining == 2
    assert isinstance(state.charge("clinic", "m", 2, budget), Charge)
    assert isinstance(state.charge("clinic", "m", 1, budget), Usage)


def test_a_budget_is_of_one_tenant_and_one_model(state):
    state.add_tenant(a_key("bank"))
    budget = Budget(1, Period.DAY)
    for tenant, model in [("clinic", "m"), ("clinic", "n"), ("bank", "m")]:
        assert isinstance(state.charge(tenant, model, 1, budget), Charge)
        assert isinstance(state.charge(tenant, model, 1, budget), Usage)


def test_its_own_budget_takes_the_place_of_the_default(state):
    state.set_budget("clinic", "m", Budget(2, Period.MONTH))
    default = Budget(1, Period.DAY)
    assert isinstance(state.charge("clinic", "m", 2, default), Charge)
    assert isinstance(state.charge("clinic", "m", 1, default), Usage)
    assert isinstance(state.charge("clinic", "n", 2, default), Usage)


@pytest.mark.parametrize(("period", "wait"), [(Period.DAY, DAY / 2), (Period.MONTH, DAY / 2)])
def test_a_period_begins_anew(state, clock, period, wait):
    budget = Budget(1, period)
    assert isinstance(state.charge("clinic", "m", 1, budget), Charge)
    clock.now = NOON + wait - 1
    assert isinstance(state.charge("clinic", "m", 1, budget), Usage)
    clock.now = NOON + wait
    assert isinstance(state.charge("clinic", "m", 1, budget), Charge)


def test_a_clock_that_jumps_back_gives_no_second_budget(state, clock):
    budget = Budget(1, Period.DAY)
    assert isinstance(state.charge("clinic", "m", 1, budget), Charge)
    clock.now += DAY
    assert isinstance(state.charge("clinic", "m", 1, budget), Charge)
    clock.now -= DAY
    assert isinstance(state.charge("clinic", "m", 1, budget), Usage)


def test_a_refund_goes_to_the_period_that_it_was_taken_from(state, clock):
    budget = Budget(5, Period.DAY)
    taken = state.charge("clinic", "m", 4, budget)
    clock.now += DAY
    state.charge("clinic", "m", 2, budget)
    state.refund(taken)
    assert used(state) == 2
    clock.now -= DAY
    assert used_of_day(state) == 0


def used_of_day(state):
    return sum(row[0] for row in state._rows("SELECT used FROM usage WHERE start = '2026-11-30'"))


def test_many_connections_never_pass_a_budget(tmp_path, state):
    """Each of eight threads has a connection of its own, as other processes would."""
    state.set_budget("clinic", "m", Budget(100, Period.DAY))
    taken = []

    def work():
        with State(tmp_path, clock=lambda: NOON) as other:
            for _ in range(30):
                if isinstance(other.charge("clinic", "m", 1, NO_LIMIT), Charge):
                    taken.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == used(state) == 100
