"""The state: migrations, damage, other users, and money that is not lost."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.copies import WAYS, in_copy

from veilhead_protocol.errors import StateError, TenantError
from veilhead_service import state_file
from veilhead_service.limits import Budget, Charge, Period, Usage
from veilhead_service.state import State
from veilhead_service.state_file import MIGRATIONS, STATE_FILE
from veilhead_service.tenants import DEFAULT_SCOPES, KeyScope, new_api_key
from veilhead_service.witness import check_agreement

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


def test_a_released_state_is_migrated_with_all_that_is_in_it(tmp_path):
    """Written by the program whose schema was version 2, and kept."""
    old = sqlite3.connect(tmp_path / STATE_FILE)
    old.executescript((Path(__file__).parent / "samples" / "state-2.sql").read_text("utf-8"))
    old.close()
    with State(tmp_path, clock=lambda: NOON) as state:
        revoked, grace = "cf0ea39329d6a6bb", "85326b4247871474"
        assert {key.id for key in state.api_keys() if key.revoked is not None} == {revoked}
        assert {key.id for key in state.api_keys() if key.expires is not None} == {grace}
        assert [row.rate_per_second for row in state.tenants()] == [50, None]
        assert state.budgets() == {("clinic", "digits"): Budget(500, Period.MONTH)}
        assert state._rows("SELECT used FROM usage ORDER BY used") == [(3,), (7,)]
        (ending,) = state.endings()  # of a backup from before, the access log will know that
        assert (ending.epoch, ending.how, ending.api_keys) == (1, "revoked", (revoked,))
        identity = state.identity()
        assert (len(identity.id), identity.log_sequence) == (32, 0)
    with State(tmp_path) as again:
        assert again.identity() == identity


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


@pytest.mark.parametrize("way", WAYS)
def test_a_copied_process_does_not_touch_the_file(tmp_path, state, way):
    """SQLite's connections must not be used in a copy, nor be closed there."""

    def work():
        with pytest.raises(StateError, match="after the fork"):
            state.charge("clinic", "m", 1, NO_LIMIT)
        with pytest.raises(StateError, match="after the fork"):
            state.tenants()
        state.close()
        with State(tmp_path, clock=lambda: NOON) as own:
            own.charge("clinic", "m", 2, NO_LIMIT)
        return state._database.total_changes  # open still

    state.charge("clinic", "m", 3, NO_LIMIT)
    in_copy(way, work)
    state.charge("clinic", "m", 4, NO_LIMIT)
    assert used(state) == 9


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


# --- many counts ----------------------------------------------------------------------------------


def test_usage_is_found_by_indexes_in_as_many_statements_whatever_there_is(state, clock):
    for day in range(40):
        clock.now = NOON - day * DAY
        for number in range(10):
            state.charge("clinic", f"model-{number}", 1, NO_LIMIT)
    clock.now = NOON
    said = []
    state._database.set_trace_callback(said.append)
    assert len(state.usage(NO_LIMIT)) == 10
    assert len(state.usage(NO_LIMIT, tenant="clinic")) == 10
    state._database.set_trace_callback(None)
    assert len(said) == 4
    plans = [row[3] for text in said for row in state._rows(f"EXPLAIN QUERY PLAN {text}")]
    assert any("usage" in plan for plan in plans)
    assert not [plan for plan in plans if plan.startswith("SCAN usage")]


def test_counts_of_periods_long_past_are_pruned_a_part_at_a_time(state, clock, monkeypatch):
    monkeypatch.setattr("veilhead_service.state._PRUNED_AT_ONCE", 3)
    month = Budget(None, Period.MONTH)
    for day in (450, 449, 448, 447, 390, 0):
        clock.now = NOON - day * DAY
        state.charge("clinic", "m", 1, NO_LIMIT)
        state.charge("clinic", "monthly", 1, month)
    clock.now = NOON
    assert state.prune()
    while state.prune():
        pass
    starts = {start for (start,) in state._rows("SELECT start FROM usage")}
    assert starts == {"2025-11-05", "2025-11", "2026-11-30", "2026-11"}
    assert used(state) == 1


# --- whether the file is the same -----------------------------------------------------------------


def test_what_is_checkpointed_is_whole_and_what_is_written_over_is_not(tmp_path, state):
    state.adopt()
    for _ in range(20):
        state.charge("clinic", "m", 1, NO_LIMIT)
    assert state.check_whole()
    state.checkpoint()
    assert state.check_whole()
    with State(tmp_path) as other:  # another process's command
        other.set_rate("clinic", 5, 5)
    assert state.check_whole()
    content = (tmp_path / STATE_FILE).read_bytes()
    copied = tmp_path / "copy"
    copied.write_bytes(content)
    shutil.copyfile(copied, tmp_path / STATE_FILE)  # the same bytes, and yet not ours
    with pytest.raises(StateError, match="written over"):
        state.check_whole()
    with pytest.raises(StateError, match="written over"):
        state.checkpoint()


def test_a_checkpoint_that_was_not_finished_is_made_again(tmp_path, state):
    state.adopt()
    state._note_looks("unknown")  # the process was killed between the two notes
    assert not state.check_whole()
    state.checkpoint()
    assert state.check_whole()


def test_a_closed_connection_leaves_the_log_of_what_took_its_place(tmp_path, state):
    state.adopt()
    for end in ("", "-wal", "-shm"):
        (tmp_path / f"{STATE_FILE}{end}").rename(tmp_path / f"aside{end}")
    with State(tmp_path) as other:
        other.add_tenant(a_key("bank"))
        log = tmp_path / f"{STATE_FILE}-wal"
        assert log.exists()
        state.close()
        assert log.exists()


def test_a_state_patched_together_is_refused(state):
    state.revoke("clinic", None)
    check_agreement(state, None)
    state._rows("UPDATE api_keys SET revoked = NULL")
    with pytest.raises(StateError, match="put together"):
        check_agreement(state, None)
