"""Keys and their rotation, encryption and decryption, without HTTP."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.heads import Pair, artifact, unit_rows

from veilhead.session import MAX_KEY_SECONDS, MAX_QUERIES_PER_KEY, Session
from veilhead_protocol.errors import (
    KeyMismatchError,
    MessageLengthError,
    ModelMismatchError,
    QueryMismatchError,
)
from veilhead_protocol.wire import QueryHeader


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(scope="module")
def small():
    return artifact(3, 16)


def test_a_key_serves_a_hundred_queries(small):
    session = Session(small.manifest)
    row = unit_rows(1, 16)[0]
    keys = [session.encrypt(row).key for _ in range(2 * MAX_QUERIES_PER_KEY)]
    assert len(set(keys[:MAX_QUERIES_PER_KEY])) == 1
    assert len(set(keys[MAX_QUERIES_PER_KEY:])) == 1
    assert keys[0] is not keys[-1]
    assert keys[0].id != keys[-1].id


def test_a_key_serves_ten_minutes(small):
    clock = Clock()
    session = Session(small.manifest, clock=clock)
    row = unit_rows(1, 16)[0]
    first = session.encrypt(row).key
    clock.now = MAX_KEY_SECONDS - 0.001
    assert session.encrypt(row).key is first
    clock.now = MAX_KEY_SECONDS
    assert session.encrypt(row).key is not first


def test_a_forgotten_key_is_not_used_again(small):
    session = Session(small.manifest)
    row = unit_rows(1, 16)[0]
    first = session.encrypt(row).key
    session.forget()
    assert session.encrypt(row).key is not first


def test_work_done_ahead_changes_no_answer(small):
    pair = Pair.of(small)
    for row in unit_rows(3, 16):
        pair.session.prepare()
        query = pair.session.encrypt(row)
        logits = pair.session.decrypt(query, pair.answer(query))
        expected = small.logits(row[np.newaxis])[0]
        assert np.abs(logits - expected).max() <= small.manifest.head.error_bound


def test_work_done_ahead_is_that_of_one_query_and_uses_up_no_key():
    clock = Clock()
    session = Session(artifact(3, 3000).manifest, clock=clock)  # two polynomials a query
    for _ in range(3 * MAX_QUERIES_PER_KEY):
        session.prepare()
    key = session._fresh_enough_key()
    assert len(key._zeros) == 2
    rows = unit_rows(1, 3000)
    queries = [session.encrypt(rows[0]) for _ in range(MAX_QUERIES_PER_KEY)]
    assert {query.key for query in queries} == {key}
    assert len({query.data for query in queries}) == MAX_QUERIES_PER_KEY
    assert not key._zeros
    session.prepare()  # for a key whose queries are used up: the next one is made
    assert session.current_key_id != key.id
    before = session.current_key_id
    clock.now = MAX_KEY_SECONDS
    session.prepare()  # and so for one that is too old
    assert session.current_key_id != before


def test_a_query_is_encrypted_when_its_polynomials_are_asked_for_and_once(small):
    pair = Pair.of(small)
    query = pair.session.encrypt(unit_rows(1, 16)[0])
    pieces = query.pieces()
    header = next(pieces)
    assert QueryHeader.deserialize(header).key_id == query.key.id
    assert query.encrypt_seconds == 0  # the header does not wait for it
    message = header + next(pieces)
    assert query.encrypt_seconds > 0
    assert message == query.data == b"".join(query.pieces())  # as a retry sends it
    assert len(message) == query.size
    # The embedding is not kept beside its encryption.
    assert not any(callable(value) for value in vars(query).values())


def test_equal_embeddings_give_unlike_queries_of_equal_length(small):
    session = Session(small.manifest)
    row = unit_rows(1, 16)[0]
    one, other = session.encrypt(row), session.encrypt(row)
    assert len(one.data) == len(other.data)
    head = 136  # the header, which is the same
    assert one.data[:head] == other.data[:head]
    assert one.data[head : head + 64] != other.data[head : head + 64]


def test_a_row_that_is_not_finite_is_encrypted_as_zeros(small):
    pair = Pair.of(small)
    row = unit_rows(1, 16)[0]
    row[3] = np.inf
    query = pair.session.encrypt(row)
    logits = pair.session.decrypt(query, pair.answer(query))
    assert np.abs(logits - small.bias).max() <= small.manifest.head.error_bound


def test_a_reply_is_for_one_query_of_one_key_and_model(small):
    pair = Pair.of(small)
    row = unit_rows(1, 16)[0]
    query, other = pair.session.encrypt(row), pair.session.encrypt(row)
    reply = pair.answer(query)
    with pytest.raises(QueryMismatchError):
        pair.session.decrypt(other, reply)
    with pytest.raises(MessageLengthError):
        pair.session.decrypt(query, reply + b"\0")
    pair.session.forget()
    with pytest.raises(KeyMismatchError):
        pair.session.decrypt(pair.session.encrypt(row), reply)
    stranger = Pair.of(artifact(3, 16, seed=9))
    with pytest.raises(ModelMismatchError):
        stranger.session.decrypt(query, reply)


def test_a_query_names_the_pinned_model_and_its_key(small):
    session = Session(small.manifest)
    query = session.encrypt(unit_rows(1, 16)[0])
    header = QueryHeader.deserialize(query.data)
    assert header.model_digest == small.manifest.digest
    assert header.key_id == query.key.id


@pytest.mark.parametrize("parameters", ["standard", "compact"])
@pytest.mark.parametrize(("classes", "dimensions"), [(1, 1), (5, 384), (73, 16), (3, 5000 - 1000)])
def test_logits_are_within_the_bound(parameters, classes, dimensions):
    pair = Pair.of(artifact(classes, dimensions, parameters=parameters, scale=0.2))
    rows = unit_rows(5, dimensions)
    plain = pair.artifact.logits(rows)
    for row, expected in zip(rows, plain, strict=True):
        query = pair.session.encrypt(row)
        logits = pair.session.decrypt(query, pair.answer(query))
        assert np.abs(logits - expected).max() <= pair.artifact.manifest.head.error_bound


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    norm=st.floats(0, 100),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.25, 1.0, 7.5]),
)
def test_embeddings_of_any_norm_and_scale_answer_as_in_plaintext(norm, seed, scale):
    from veilhead_models.artifact import HeadArtifact

    generator = np.random.default_rng(1)
    head = HeadArtifact.from_weights(
        generator.normal(size=(3, 16)), None, ["a", "b", "c"], name="x", embedding_scale=scale
    )
    pair = Pair.of(head)
    row = norm * unit_rows(1, 16, seed=seed)[0]
    query = pair.session.encrypt(row)
    logits = pair.session.decrypt(query, pair.answer(query))
    assert np.abs(logits - head.logits(row[np.newaxis])[0]).max() <= head.manifest.head.error_bound
