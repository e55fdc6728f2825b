"""Keys and their rotation, encryption and decryption, without HTTP."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.heads import Pair, artifact, unit_rows

from veilhead import even_encoding
from veilhead.even_encoding import encode_evenly
from veilhead.session import MAX_KEY_SECONDS, MAX_QUERIES_PER_KEY, SecretKey, Session
from veilhead_protocol import seal_io
from veilhead_protocol.encoding import decode, encode
from veilhead_protocol.errors import (
    EncryptionError,
    KeyMismatchError,
    MessageLengthError,
    ModelMismatchError,
    NotFiniteError,
    QueryMismatchError,
)
from veilhead_protocol.parameters import COMPACT
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
    session = Session(artifact(4, 3000).manifest, clock=clock)  # three polynomials a query
    for _ in range(3 * MAX_QUERIES_PER_KEY):
        session.prepare()
    key = session._fresh_enough_key()
    assert len(key._zeros) == 3
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


def sent(pair, rows):
    """What is in a query of rows [b, d]: [b, d], up to the encryption's noise; and its failures."""
    found = []
    encrypt = SecretKey.encrypt

    def watched(self, coefficients, scale_bits):
        found.append(coefficients)
        return encrypt(self, coefficients, scale_bits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SecretKey, "encrypt", watched)
        query = pair.session.encrypt_batch(rows)
    layout, dimensions = query.layout, rows.shape[1]
    stride = layout.group * layout.block_length
    pieces = np.array(found)[:, : layout.texts * stride]  # [P, b G t]
    blocks = pieces.reshape(layout.pieces, layout.texts, stride)[..., : layout.block_length]
    return blocks.transpose(1, 0, 2).reshape(layout.texts, -1)[:, :dimensions], query


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_encrypted_as_a_fresh_random_unit_vector(small, value):
    pair = Pair.of(small)
    rows = unit_rows(4, 16)
    rows[1, 3] = value
    decoys = []
    for _ in range(2):
        found, query = sent(pair, rows)
        assert list(query.failures) == [1]
        assert isinstance(query.failures[1], NotFiniteError)
        assert np.allclose(found[[0, 2, 3]], rows[[0, 2, 3]])
        assert np.linalg.norm(found[1]) == pytest.approx(1)
        decoys.append(found[1])
        logits = pair.session.decrypt_batch(query, pair.answer(query))
        expected = found @ small.weight.T + small.bias
        assert np.abs(logits - expected).max() <= small.manifest.head.error_bound
    assert np.abs(decoys[0] - decoys[1]).max() > 0.01
    other, _ = sent(Pair.of(small), rows)
    assert all(np.abs(other[1] - decoy).max() > 0.01 for decoy in decoys)  # by no fixed seed


@pytest.mark.parametrize("texts", [1, 4])
def test_whatever_fails_after_the_header_a_decoy_of_as_many_bytes_is_sent(
    small, texts, monkeypatch
):
    def fails(embeddings, scale):
        raise FloatingPointError("overflow: 4711")

    pair = Pair.of(small)
    rows = unit_rows(texts, 16)
    encrypt = (
        pair.session.encrypt_batch if texts > 1 else lambda rows: pair.session.encrypt(rows[0])
    )
    size = len(encrypt(rows).data)
    monkeypatch.setattr("veilhead.session.project", fails)
    query = encrypt(rows)
    assert len(b"".join(query.pieces())) == size == query.size
    assert pair.session.decrypt_batch(query, pair.answer(query)).shape == (texts, 3)
    assert list(query.failures) == list(range(texts))
    assert isinstance(query.failures[0], EncryptionError)
    assert "FloatingPointError" in str(query.failures[0])
    assert "4711" not in str(query.failures[0])


def test_decoys_are_drawn_whether_they_are_needed_or_not(small, monkeypatch):
    """Or the time that it takes would tell which rows have one."""
    session = Session(small.manifest)
    drawn = []

    class Watched:
        def random(self, shape):
            drawn.append(shape)
            return np.random.default_rng().random(shape)

    session._random = Watched()
    rows = unit_rows(4, 16)
    _ = session.encrypt_batch(rows).data
    rows[0, 0] = np.nan
    _ = session.encrypt_batch(rows).data
    assert drawn == [(4, 16)] * 2


KINDS = {
    "ordinary": lambda: unit_rows(1, 16, seed=int(time.time_ns() % 2**32))[0],
    "zeros": lambda: np.zeros(16),
    "one value": lambda: np.eye(16)[3],
    "all negative": lambda: np.full(16, -0.25),
    "subnormal": lambda: np.full(16, 5e-324),
    "partly subnormal": lambda: np.r_[0.5, np.full(15, 3e-310)],
    "tiny": lambda: np.full(16, 2.0**-60),
    "a little below a unit": lambda: np.full(16, 0.75 * 2.0**-37),
    "huge": lambda: np.full(16, 1e300),
    "not finite": lambda: np.full(16, np.nan),
}


def test_seals_encoder_meets_no_value_that_tells_of_the_row(small, monkeypatch):
    """It branches on signs, on whole numbers and on residues, and subnormal numbers are slow."""
    session = Session(small.manifest)
    scale_bits = small.manifest.scales.query_scale_bits
    met = []

    def watched(runtime, coefficients, bits):
        met.append(coefficients.copy())
        return encode(runtime, coefficients, bits)

    even_encoding._masks(small.manifest.parameter_set, scale_bits)  # made before
    monkeypatch.setattr(even_encoding, "encode", watched)
    for kind in KINDS.values():
        row = kind()
        for _ in range(3):
            _ = session.encrypt(row).data
        first, second, third = met
        met.clear()
        for coefficients in (first, second, third):
            assert coefficients.min() >= 1  # positive, and of one magnitude
            assert coefficients.max() <= 5
            away = np.abs(coefficients * 2.0**scale_bits % 1 - 0.5)
            assert (away == 0.5).mean() < 0.01  # hardly one is a whole number of units
        # Equal rows are not encoded as equal values, which a processor would learn.
        assert np.abs(first - second).max() > 0.1 or np.abs(first - third).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_masks_change_no_answer(small, kind):
    pair = Pair.of(small)
    row = KINDS[kind]()
    query = pair.session.encrypt(row)
    logits = pair.session.decrypt(query, pair.answer(query))
    if kind != "not finite":
        expected = small.logits(row[np.newaxis])[0]
        assert np.abs(logits - expected).max() <= small.manifest.head.error_bound


def test_masks_add_less_to_the_noise_than_the_scales_count_for_them():
    seal, bits = seal_io.runtime(COMPACT), 37
    generator = np.random.default_rng(4)
    coefficients = generator.uniform(-1, 1, size=COMPACT.poly_modulus_degree)
    errors = []
    for _ in range(20):
        parts = encode_evenly(seal, coefficients, bits)
        found = sum(decode(seal, part) for part in parts)  # a table's encodings: no modulus is met
        errors.append((found - coefficients) * 2.0**bits)
    assert np.abs(errors).max() < 1
    assert np.var(errors) < 0.1


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
