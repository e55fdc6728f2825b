"""Versions come and go while the service runs, with a date in between."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta, timezone
from email.utils import parsedate_to_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from support.heads import artifact

from veilhead_protocol.errors import ModelRetiredError, StoreError
from veilhead_service.app import create_app
from veilhead_service.model_store import ModelStore, retire
from veilhead_service.retirement import Retirement
from veilhead_service.settings import Settings

FIRST, SECOND = (artifact(4, 32, seed=seed, name="model") for seed in (1, 2))
SOON = Retirement(datetime(2027, 1, 2, tzinfo=UTC))


@pytest.fixture
def models(vendor, clock):
    return ModelStore(vendor.store, clock=clock)


@pytest.fixture
def client(models):
    """Of an app whose store has a clock of the test's; without workers."""
    return TestClient(create_app(Settings(workers=1, insecure_no_tenants=True), models=models))


# --- dates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2027-03-31", datetime(2027, 3, 31, tzinfo=UTC)),
        ("2027-03-31T18:30", datetime(2027, 3, 31, 18, 30, tzinfo=UTC)),
        (" 2027-03-31 18:30:15Z\n", datetime(2027, 3, 31, 18, 30, 15, tzinfo=UTC)),
        ("2027-03-31T18:30+02:00", datetime(2027, 3, 31, 16, 30, tzinfo=UTC)),
        ("2027-03-31T18:30:15.9Z", datetime(2027, 3, 31, 18, 30, 15, tzinfo=UTC)),
    ],
)
def test_dates_are_read_as_utc(text, moment):
    assert Retirement.parse(text).after == moment


@pytest.mark.parametrize(
    "text", ["", "soon", "2027", "2027-13-01", "20270331", "2027-W01-1", "31.03.2027", "1" * 900]
)
def test_other_dates_are_refused(text):
    with pytest.raises(StoreError, match="expected a date"):
        Retirement.parse(text)


@given(
    st.datetimes(
        min_value=datetime(1000, 1, 1),
        max_value=datetime(9998, 1, 1),
        timezones=st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30))]),
    )
)
def test_records_and_headers_keep_the_second(moment):
    retirement = Retirement(moment)
    assert Retirement.deserialize(retirement.serialize()) == retirement
    assert parsedate_to_datetime(retirement.http_date) == moment.replace(microsecond=0)


def test_a_record_of_a_mistyped_year_is_readable():
    retirement = Retirement.parse("0202-03-31")
    assert Retirement.deserialize(retirement.serialize()) == retirement


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"after": "2027-01-01"}',
        b'{"format": "veilhead-retirement/2", "after": "2027-01-01"}',
        b'{"format": "veilhead-retirement/1", "after": 7}',
        b'{"format": "veilhead-retirement/1", "after": "2027-01-01", "x": 1}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_record_is_an_error_and_not_a_pardon(vendor, models, content):
    digest = vendor.publish(FIRST)
    vendor.version("model", f"{digest}.retired").write_bytes(content)
    with pytest.raises(StoreError):
        models.current("model")


@given(st.binary(max_size=200) | st.text(max_size=40).map(lambda text: text.encode()))
def test_any_other_record_is_one_error(content):
    with pytest.raises(StoreError):
        Retirement.deserialize(content)


# --- without a restart ----------------------------------------------------------------------------


def test_a_version_serves_until_its_date(vendor, models, clock):
    digest = bytes.fromhex(vendor.publish(FIRST))
    assert models.current("model").retirement is None
    retire(vendor.store, "model", None, SOON)
    assert models.current("model").retirement == SOON
    clock.move(hours=24, seconds=-1)
    assert models.version("model", digest).retirement == SOON
    clock.move(seconds=1)
    for ask in (lambda: models.current("model"), lambda: models.version("model", digest)):
        with pytest.raises(ModelRetiredError, match="2027-01-02T00:00:00Z"):
            ask()


def test_a_retirement_can_be_moved_and_withdrawn(vendor, models, clock):
    digest = vendor.publish(FIRST)
    retire(vendor.store, "model", digest, SOON)
    clock.move(days=2)
    with pytest.raises(ModelRetiredError):
        models.current("model")
    later = Retirement(datetime(2028, 1, 1, tzinfo=UTC))
    assert retire(vendor.store, "model", digest, later) == digest
    assert models.current("model").retirement == later
    assert retire(vendor.store, "model", digest, None) == digest
    assert models.current("model").retirement is None
    retire(vendor.store, "model", digest, None)  # twice changes nothing


def test_a_new_version_takes_over_and_the_old_one_overlaps(vendor, models, clock):
    old = vendor.publish(FIRST)
    new = vendor.publish(SECOND, retire_previous=SOON)
    assert models.current("model").manifest.digest.hex() == new
    assert models.current("model").retirement is None
    assert models.version("model", bytes.fromhex(old)).retirement == SOON
    clock.move(days=1)
    with pytest.raises(ModelRetiredError, match=f"current one is {new}"):
        models.version("model", bytes.fromhex(old))
    assert models.current("model").manifest.digest.hex() == new


def test_an_earlier_date_of_the_previous_version_stays(vendor, models):
    old = vendor.publish(FIRST)
    retire(vendor.store, "model", old, SOON)
    vendor.publish(SECOND, retire_previous=Retirement(datetime(2029, 1, 1, tzinfo=UTC)))
    assert models.version("model", bytes.fromhex(old)).retirement == SOON


def test_publishing_the_current_version_again_does_not_retire_it(vendor, models):
    vendor.publish(FIRST, retire_previous=SOON)
    vendor.publish(FIRST, retire_previous=SOON)
    assert models.current("model").retirement is None


def test_a_retired_version_is_not_published_by_accident(vendor, models):
    old = vendor.publish(FIRST)
    vendor.publish(SECOND, retire_previous=SOON)
    with pytest.raises(StoreError, match="--withdraw"):
        vendor.publish(FIRST)
    retire(vendor.store, "model", old, None)
    vendor.publish(FIRST)
    assert models.current("model").manifest.digest.hex() == old


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("absent", None),
        ("../store", None),
        ("model", "0" * 64),
        ("model", "current"),
        ("model", ".."),
        ("model", "A" * 64),
        ("../store/model", "0" * 64),
    ],
)
def test_only_what_is_published_can_be_retired(vendor, name, digest):
    vendor.publish(FIRST)
    before = sorted(vendor.root.rglob("*"))
    with pytest.raises(StoreError):
        retire(vendor.store, name, digest, SOON)
    assert sorted(vendor.root.rglob("*")) == before


def test_a_version_that_is_removed_is_gone(vendor, models):
    digest = vendor.publish(FIRST)
    assert models.version("model", bytes.fromhex(digest)) is not None
    vendor.version("model", digest).rename(vendor.root / "elsewhere")
    assert models.version("model", bytes.fromhex(digest)) is None


def test_a_crash_while_writing_leaves_the_old_record(vendor, models, monkeypatch):
    digest = vendor.publish(FIRST)
    retire(vendor.store, "model", digest, SOON)

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match="No space left"):
        retire(vendor.store, "model", digest, Retirement(datetime(2029, 1, 1, tzinfo=UTC)))
    assert models.current("model").retirement == SOON
    entries = {path.name for path in (vendor.store / "model").iterdir()}
    assert entries == {digest, f"{digest}.retired", "current"}


# --- over HTTP ------------------------------------------------------------------------------------


def test_only_a_header_says_so_before_the_date(client, vendor):
    digest = vendor.publish(FIRST)
    before = client.get(f"/v1/models/model?digest={digest}")
    assert "sunset" not in before.headers
    retire(vendor.store, "model", digest, SOON)
    for path in ("/v1/models/model", f"/v1/models/model?digest={digest}"):
        after = client.get(path)
        assert (after.status_code, after.content) == (200, before.content)
        assert after.headers["sunset"] == "Sat, 02 Jan 2027 00:00:00 GMT"
        assert after.headers["cache-control"] == "no-cache"
        known = client.get(path, headers={"If-None-Match": after.headers["etag"]})
        assert (known.status_code, known.headers["sunset"]) == (304, after.headers["sunset"])
    assert [row["name"] for row in client.get("/v1/models").json()["models"]] == ["model"]


def test_after_the_date_everything_of_the_version_is_gone(client, vendor, clock, problem):
    digest = vendor.publish(FIRST)
    retire(vendor.store, "model", None, SOON)
    clock.move(days=1)
    for path in ("", f"?digest={digest}", "/files/config.json"):
        problem(client.get(f"/v1/models/model{path}"), 410, "model-retired")
    assert client.get("/v1/models").json() == {"models": []}


def test_a_query_for_a_retired_version_learns_which_is_current(vendor, make_service, problem):
    """In a running service: the old version answers until it does not, the new one goes on."""
    vendor.publish(FIRST)
    with TestClient(
        create_app(Settings(store=vendor.store, workers=1, insecure_no_tenants=True))
    ) as client:
        old = make_service(client, {"model": FIRST})
        old.check_answers("model")
        session = old.session("model")
        query = old.query("model", session=session)
        new = vendor.publish(SECOND, retire_previous=Retirement.parse("2100-01-01"))
        old.check_answers("model")
        make_service(client, {"model": SECOND}).check_answers("model")
        retire(vendor.store, "model", FIRST.manifest.digest.hex(), Retirement.parse("2020-01-01"))
        body = problem(old.infer("model", query.data), 410, "model-retired")
        assert new in body["detail"]
        make_service(client, {"model": SECOND}).check_answers("model")
        # Without a current version, one that is not retired still answers who knows it.
        retire(vendor.store, "model", new, Retirement.parse("2020-01-01"))
        retire(vendor.store, "model", FIRST.manifest.digest.hex(), None)
        problem(client.get("/v1/models/model"), 410, "model-retired")
        old.check_answers("model")
