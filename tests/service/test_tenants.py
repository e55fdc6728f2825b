"""API keys: what they look like, what of them is kept, and when they open."""

from __future__ import annotations

import hashlib
import re
import time

import pytest
from support.tenants import add_tenant

from veilhead_protocol.errors import TenantError
from veilhead_service import tenants
from veilhead_service.state import State
from veilhead_service.tenants import (
    DEFAULT_SCOPES,
    KeyScope,
    check_tenant_name,
    key_id_of,
    new_api_key,
    opens,
)

NOW = 1_800_000_000.0


@pytest.fixture
def made():
    return new_api_key("clinic", DEFAULT_SCOPES, now=NOW, expires=NOW + 10)


def test_a_key_opens_in_its_written_form(made):
    key, written = made
    assert re.fullmatch(r"vh_[0-9a-f]{16}_[A-Za-z0-9_-]{43}", written)
    assert key_id_of(written) == key.id
    assert opens(key, written, now=NOW)


def test_no_two_keys_are_alike():
    made = [new_api_key("clinic", DEFAULT_SCOPES, now=NOW, expires=None) for _ in range(50)]
    assert len({key.id for key, _ in made}) == len({written for _, written in made}) == 50


def test_a_changed_key_does_not_open(made):
    key, written = made
    for index in range(len(written)):
        changed = written[:index] + ("A" if written[index] != "A" else "B") + written[index + 1 :]
        if not re.fullmatch(r"vh_[0-9a-f]{16}_.*", changed):
            assert key_id_of(changed) is None
        elif index > 19:  # the id only says which key is meant
            assert not opens(key, changed, now=NOW)
    for changed in ("", "vh_", written + "A", written[:-1], written + "\n", " " + written):
        assert not opens(key, changed, now=NOW)


def test_expiry_and_revocation_end_it(made):
    key, written = made
    assert opens(key, written, now=NOW + 9.999)
    assert not opens(key, written, now=NOW + 10)
    revoked = tenants.ApiKey(**{**vars(key), "revoked": NOW - 1})
    assert not opens(revoked, written, now=NOW)


def test_an_unknown_key_costs_the_same_comparison(made, monkeypatch):
    compared = []

    def compare(left, right):
        compared.append((len(left), len(right)))
        return left == right

    monkeypatch.setattr(tenants.hmac, "compare_digest", compare)
    key, written = made
    for candidate, text in [(key, written), (None, written), (key, "garbage"), (None, "")]:
        opens(candidate, text, now=NOW)
    assert compared == [(32, 32)] * 4


def test_the_digest_that_stands_for_no_key_opens_nothing(made):
    assert not opens(None, made[1], now=NOW)


def test_the_secret_is_nowhere_but_in_the_written_form(tmp_path):
    written = add_tenant(tmp_path, "clinic")
    secret = written.split("_", 2)[2]
    with State(tmp_path) as state:
        (key,) = state.api_keys()
        shown = f"{key!r} {key} {state.audit()!r} {state.tenants()!r}"
        content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert key.secret_digest == hashlib.sha256(secret.encode()).digest()
    assert secret not in shown
    assert key.secret_digest.hex() not in repr(key)
    assert key.secret_digest in content
    assert secret.encode() not in content


@pytest.mark.parametrize("name", ["a", "7", "a-b", "x" * 63, "clinic-2"])
def test_slugs_are_names(name):
    assert check_tenant_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "A", "a b", "a_b", "a/b", "x" * 64, "ä", "a\n", "insecure-local"]
)
def test_other_names_are_refused(name):
    with pytest.raises(TenantError, match="lower-case"):
        new_api_key(name, DEFAULT_SCOPES, now=time.time(), expires=None)


def test_a_key_without_scopes_is_refused():
    with pytest.raises(TenantError, match="scope"):
        new_api_key("clinic", frozenset(), now=NOW, expires=None)


def test_metrics_are_not_for_every_tenant():
    assert KeyScope.METRICS not in DEFAULT_SCOPES
