"""PUT, HEAD and DELETE of keys, and what queries notice of them."""

from __future__ import annotations

import hashlib

import pytest
from starlette.testclient import TestClient

from veilhead.session import SecretKey
from veilhead_protocol.parameters import COMPACT
from veilhead_protocol.wire import KeyMessage
from veilhead_service.app import create_app
from veilhead_service.settings import Settings


@pytest.fixture
def message(service):
    """A key message that the service has not met."""
    manifest = service.artifacts["digits"].manifest
    return SecretKey(manifest.parameter_set).message


def path(message):
    return f"/v1/keys/{hashlib.sha256(message).hexdigest()}"


def test_a_new_key_is_created_and_a_known_one_is_not(service, message):
    for status in (201, 200, 200):
        response = service.put(message)
        assert response.status_code == status
        assert response.json() == {"id": hashlib.sha256(message).hexdigest()}
        assert len(response.headers["x-request-id"]) == 32


def test_head_tells_whether_a_key_is_registered(service, message):
    missing = service.client.head(path(message))
    assert missing.status_code == 404
    service.put(message)
    assert service.client.head(path(message)).status_code == 200
    assert service.client.head(path(message)).content == b""


def test_delete_forgets_once(service, message, problem):
    service.put(message)
    response = service.client.delete(path(message))
    assert (response.status_code, response.content) == (204, b"")
    assert service.client.head(path(message)).status_code == 404
    problem(service.client.delete(path(message)), 404, "key-not-registered")
    assert service.put(message).status_code == 201


def test_delete_leaves_other_keys(service, message):
    query = service.query("digits")
    service.put(message)
    service.client.delete(path(message))
    assert service.infer("digits", query.data).status_code == 200


def test_a_query_under_a_forgotten_key_succeeds_after_the_same_bytes_are_put_again(
    service, problem
):
    session = service.session("digits")
    query = service.query("digits", session=session)
    first = service.infer("digits", query.data)
    assert first.status_code == 200
    assert service.client.delete(path(query.key.message)).status_code == 204
    for _ in range(3):  # whatever worker is asked, and however recently it used the key
        response = service.infer("digits", query.data)
        problem(response, 404, "key-not-registered", sent=query.data)
    assert service.put(query.key.message).status_code == 201
    second = service.infer("digits", query.data)
    logits = [session.decrypt(query, reply.content) for reply in (first, second)]
    assert (
        abs(logits[0] - logits[1]).max()
        <= 2 * service.artifacts["digits"].manifest.head.error_bound
    )


def test_the_id_is_the_digest_of_the_body(service, message, problem):
    wrong = hashlib.sha256(message + b"\0").hexdigest()
    problem(service.put(message, wrong), 422, "digest-mismatch", sent=message)
    assert service.client.head(f"/v1/keys/{wrong}").status_code == 404
    assert service.client.head(path(message)).status_code == 404


@pytest.mark.parametrize(
    "change",
    [
        lambda digest: digest[:-1],
        lambda digest: digest + "0",
        lambda digest: digest.upper(),
        lambda digest: "g" + digest[1:],
        lambda digest: "\N{ARABIC-INDIC DIGIT ONE}" + digest[1:],
        lambda digest: " " + digest[1:],
        lambda digest: "0x" + digest[2:],
        lambda digest: "%00" + digest[1:],
    ],
    ids=["short", "long", "upper", "letter", "other-digits", "space", "prefix", "nul"],
)
def test_a_malformed_id_is_refused(service, message, change, problem):
    # The digits are sure to hold a letter, so that upper case differs.
    malformed = "/v1/keys/" + change("ab" + hashlib.sha256(message).hexdigest()[2:])
    headers = {"Content-Type": "application/octet-stream"}
    response = service.client.put(malformed, content=message, headers=headers)
    problem(response, 422, "malformed-digest", sent=message)
    problem(service.client.delete(malformed), 422, "malformed-digest")
    assert service.client.head(malformed).status_code == 422


def test_a_key_of_either_set_is_a_key(service):
    manifest = service.artifacts["compact"].manifest
    compact = SecretKey(manifest.parameter_set).message
    assert len(compact) == KeyMessage.size(COMPACT)
    assert service.put(compact).status_code == 201


def test_a_refused_key_is_not_registered(service, message, problem):
    broken = message[:4] + b"\x01" + message[5:]
    problem(service.put(broken), 422, "unsupported-format-version", sent=broken)
    assert service.client.head(path(broken)).status_code == 404


def test_keys_make_room_for_newer_ones(store, artifacts, make_service, service):
    """With room for four keys, the fifth takes the place of the least recently used."""
    app = create_app(
        Settings(store=store, key_memory_bytes=2**17, insecure_no_tenants=True)
    )  # no workers are started
    small = make_service(TestClient(app), artifacts)
    manifest = artifacts["digits"].manifest
    keys = [SecretKey(manifest.parameter_set).message for _ in range(5)]
    assert 4 * len(keys[0]) <= 2**17 < 5 * len(keys[0])
    for key in keys[:4]:
        assert small.put(key).status_code == 201
    assert small.client.head(path(keys[0])).status_code == 200  # a use
    assert small.put(keys[4]).status_code == 201
    registered = [small.client.head(path(key)).status_code == 200 for key in keys]
    assert registered == [True, False, True, True, True]
