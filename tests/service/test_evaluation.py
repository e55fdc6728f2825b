"""The encrypted head: right answers for every shape, in messages of every kind."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from support.heads import Pair, artifact, unit_rows

import veilhead
import veilhead_models
import veilhead_protocol
import veilhead_service
from veilhead_models.artifact import HeadArtifact
from veilhead_protocol import seal_io
from veilhead_protocol.errors import (
    KeyMismatchError,
    ModelMismatchError,
    ParameterMismatchError,
    ScaleError,
)
from veilhead_protocol.parameters import COMPACT, STANDARD
from veilhead_protocol.wire import Domain, Prng, ReplyMessage, pack_bits
from veilhead_service.encrypted_head import ClientKey, EncryptedHead, multiply_modulo, truncate


def head_of(weight, bias, parameters="standard"):
    labels = [f"label {index}" for index in range(len(bias))]
    return HeadArtifact.from_weights(weight, bias, labels, name="model", parameters=parameters)


def check_answers(head, *, rows=2, error=None):
    """Encrypted logits within the manifest's bound of the plaintext's."""
    pair = Pair.of(head)
    for embedding in unit_rows(rows, head.weight.shape[1]):
        query = pair.session.encrypt(embedding)
        reply = pair.answer(query)
        manifest = head.manifest
        assert len(reply) == ReplyMessage.size(manifest.layout, manifest.head.reply_bits)
        found = pair.session.decrypt(query, reply)
        expected = head.weight @ embedding + head.bias
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= (error or manifest.head.error_bound)


# --- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "dimensions", "classes"),
    [
        ("standard", 1, 1),
        ("standard", 1, 200),  # the limit of hints decides
        ("standard", 7, 3),
        ("standard", 384, 1),
        ("standard", 384, 4),
        ("standard", 384, 5),  # exactly one group
        ("standard", 384, 6),
        ("standard", 384, 10),
        ("standard", 384, 11),
        ("standard", 384, 77),
        ("standard", 1000, 3),  # d does not divide N
        ("standard", 1024, 4),
        ("standard", 1025, 3),  # one class a polynomial
        ("standard", 2047, 2),
        ("standard", 2048, 2),  # d = N
        ("standard", 2049, 2),  # the second piece holds one feature
        ("standard", 3000, 3),
        ("standard", 4096, 2),
        ("compact", 1, 1),
        ("compact", 384, 9),
        ("compact", 384, 10),  # exactly one group
        ("compact", 384, 11),
        ("compact", 768, 6),
        ("compact", 2049, 2),
        ("compact", 4095, 2),
        ("compact", 4096, 2),  # d = N
    ],
)
def test_answers_are_within_the_bound(parameters, dimensions, classes):
    scale = min(0.5, 8 / dimensions**0.5)
    check_answers(artifact(classes, dimensions, parameters=parameters, scale=scale))


def test_the_bound_is_a_bound_worth_having():
    """For heads of the size that trained ones have; the rounding is 2^-13 of it."""
    for parameters in ("standard", "compact"):
        bound = artifact(22, 384, parameters=parameters, scale=0.25).manifest.head.error_bound
        assert bound <= 2.0**-10 + 2.0**-13


@pytest.mark.parametrize(
    ("parameters", "exponent"),
    [("standard", e) for e in (0, 1, 4, 6, 7, 8, 12, 16, 24)]
    + [("compact", e) for e in (0, 4, 6, 7, 12, 16, 24)],
)
def test_heads_of_every_exponent(parameters, exponent):
    random = np.random.default_rng(exponent)
    weight = random.normal(size=(3, 64))
    # Norm plus bias at nine tenths of 2^e, the second row exactly there.
    weight *= 0.6 * 2.0**exponent / np.linalg.norm(weight, axis=1, keepdims=True)
    head = head_of(weight, np.array([0.1, -0.3, 0.2]) * 2.0**exponent, parameters)
    assert head.manifest.head.exponent == exponent
    assert head.manifest.head.downscale_bits == max(0, exponent - 6)
    check_answers(head, rows=3)


def test_a_logit_at_the_edge_does_not_wrap():
    """The embedding along the weights gives the largest logit there is, and the least."""
    for parameters, exponent in (("standard", 4), ("compact", 6), ("standard", 12)):
        direction = unit_rows(1, 64)[0]
        largest = 2.0**exponent * (1 - 2.0**-9 - 2.0 ** (-5 - min(exponent, 6)))
        weight = np.stack([direction, -direction]) * (largest - 1)
        head = head_of(weight, np.array([1.0, -1.0]), parameters)
        assert head.manifest.head.exponent == exponent
        pair = Pair.of(head)
        query = pair.session.encrypt(direction)
        found = pair.session.decrypt(query, pair.answer(query))
        assert np.abs(found - [largest, -largest]).max() <= head.manifest.head.error_bound


def test_heads_beyond_every_exponent_are_refused():
    with pytest.raises(ScaleError):
        head_of(np.full((1, 4), 2.0**24), np.zeros(1), "compact")


# --- zeros: SEAL refuses to multiply by them ----------------------------------------------------


@pytest.mark.parametrize("parameters", ["standard", "compact"])
@pytest.mark.parametrize("dimensions", [64, 384, 3000, 4096])
def test_a_head_of_zeros_answers_with_its_bias(parameters, dimensions):
    bias = np.array([0.5, -1.25, 0.0])
    check_answers(head_of(np.zeros((3, dimensions)), bias, parameters))


@pytest.mark.parametrize("parameters", ["standard", "compact"])
@pytest.mark.parametrize("zero_rows", [[0], [21], [3, 4], range(5), range(5, 10), range(15)])
def test_zero_rows_and_whole_groups_of_them(parameters, zero_rows):
    random = np.random.default_rng(6)
    weight = random.normal(scale=0.3, size=(22, 384))
    weight[list(zero_rows)] = 0
    check_answers(head_of(weight, random.normal(size=22), parameters), rows=1)


@pytest.mark.parametrize("zero_piece", [slice(0, 2048), slice(2048, 3000)])
def test_a_zero_piece_of_a_row(zero_piece):
    random = np.random.default_rng(7)
    weight = random.normal(scale=0.1, size=(3, 3000))
    weight[1, zero_piece] = 0
    check_answers(head_of(weight, random.normal(size=3)))


class Counting:
    """SEAL's evaluator, and how often it was asked for what."""

    def __init__(self, evaluator):
        self._evaluator, self.calls = evaluator, Counter()

    def __getattr__(self, name):
        method = getattr(self._evaluator, name)

        def counted(*arguments):
            self.calls[name] += 1
            return method(*arguments)

        return counted


def test_zero_weights_cost_the_same_work_as_others(monkeypatch):
    """An answer's time does not tell how many weight polynomials are zero."""
    random = np.random.default_rng(7)
    calls = []
    for zeros in (slice(0, 0), slice(0, 5), slice(0, 22)):
        weight = random.normal(scale=0.3, size=(22, 384))
        weight[zeros] = 0
        pair = Pair.of(head_of(weight, random.normal(size=22)))
        counting = Counting(pair.head._seal.evaluator)
        monkeypatch.setattr(pair.head, "_seal", replace(pair.head._seal, evaluator=counting))
        pair.answer(pair.session.encrypt(unit_rows(1, 384)[0]))
        calls.append(counting.calls)
    assert calls[0]["add_inplace"] == pair.head.layout.products
    assert calls[0] == calls[1] == calls[2]


def test_weights_that_round_to_zero():
    check_answers(head_of(np.full((2, 384), 1e-9), np.array([0.0, 0.25])))


def test_a_zero_embedding_gets_the_bias():
    head = artifact(22, 384)
    pair = Pair.of(head)
    query = pair.session.encrypt(np.zeros(384))
    found = pair.session.decrypt(query, pair.answer(query))
    assert np.abs(found - head.bias).max() <= head.manifest.head.error_bound


# --- messages -----------------------------------------------------------------------------------


class SecretOfAnyDialect:
    """Keys and queries of one ternary secret, in every PRNG and domain.

    SEAL expands seeds and transforms; the product with the secret is the independent client's.
    """

    def __init__(self, independent, head):
        self._independent = independent
        self.model = independent.Model.from_manifest(head.manifest.serialize())
        self.parameters = head.manifest.parameter_set
        random = np.random.default_rng(8)
        self.secret = random.integers(-1, 2, size=self.parameters.poly_modulus_degree)
        self._random = random

    def _encrypt(self, message, prng, domain):
        """Packed residues and seed of -(a s + e) + message."""
        level, prime = seal_io.runtime(self.parameters), self.parameters.prime
        seed = self._random.bytes(64)
        degree = len(message)
        zero = np.zeros(degree, dtype=np.uint64)
        in_ntt = domain is Domain.NTT
        expanded = seal_io.load_seeded_ciphertext(
            level, zero, seed, prng=prng, ntt_form=in_ntt, scale_bits=0
        )
        level.evaluator.transform_from_ntt_inplace(expanded)
        mask = seal_io.save_ciphertext(level, expanded)[1].astype(np.int64)  # [N]
        error = self._random.integers(-3, 4, size=degree)
        product = self._independent.times_ternary(mask, self.secret, prime)
        residues = ((message % prime - product - error) % prime).astype(np.uint64)
        if in_ntt:
            # As coefficients under any seed: only its c0 is of interest.
            ciphertext = seal_io.load_seeded_ciphertext(
                level, residues, seed, prng=prng, ntt_form=False, scale_bits=0
            )
            residues = seal_io.save_ciphertext(level, ciphertext)[0]
        return pack_bits(residues, prime.bit_length()) + seed

    def key(self, prng, domain):
        message = np.zeros(self.model.degree, dtype=np.int64)
        return self.model.prefix(1, prng, domain) + self._encrypt(message, prng, domain)

    def query(self, embedding, key_id, prng, domain):
        model = self.model
        pieces = model.place(embedding[np.newaxis])
        body = b"".join(self._encrypt(piece, prng, domain) for piece in pieces)
        return model.prefix(2, prng, domain) + model.target(key_id, model.pieces) + body

    def decrypt(self, query, reply, key_id):
        client = self._independent.Client(self.model, self.secret)
        client.key_id = key_id
        return client.logits(query, reply)


DIALECTS = list(product([Prng.BLAKE2XB, Prng.SHAKE256], [Domain.COEFFICIENT, Domain.NTT]))


@pytest.mark.parametrize(
    ("parameters", "dimensions"), [("standard", 384), ("standard", 3000), ("compact", 384)]
)
def test_every_dialect_of_key_and_query_gives_the_same_logits(independent, parameters, dimensions):
    head = artifact(3, dimensions, parameters=parameters, scale=0.1)
    secret = SecretOfAnyDialect(independent, head)
    served = EncryptedHead(head.manifest, head.weight, head.bias)
    embedding = unit_rows(1, dimensions)[0]
    expected = head.weight @ embedding + head.bias
    for key_dialect in DIALECTS:
        message = secret.key(*key_dialect)
        key = ClientKey.from_message(message)
        assert key.id == hashlib.sha256(message).digest()
        for query_dialect in DIALECTS:
            query = secret.query(embedding, key.id, *query_dialect)
            found = secret.decrypt(query, served.evaluate(query, key), key.id)
            assert np.abs(found - expected).max() <= head.manifest.head.error_bound


def test_standard_messages_are_as_small_as_promised():
    head = artifact(22, 384)
    pair = Pair.of(head)
    query = pair.session.encrypt(unit_rows(1, 384)[0])
    assert len(query.key.message) <= 27_240
    layout = head.manifest.layout
    assert (layout.pieces, layout.replies) == (1, 3)
    assert len(query.data) <= 27_340
    assert len(pair.answer(query)) <= 3 * 12_900


def parse(pair, query, reply):
    manifest = pair.artifact.manifest
    return ReplyMessage.deserialize(
        reply,
        manifest.parameter_set,
        manifest.layout,
        manifest.head.reply_bits,
        model_digest=manifest.digest,
        key_id=query.key.id,
        query_digest=query.digest,
    )


@pytest.mark.parametrize("parameters", ["standard", "compact"])
def test_the_same_query_gets_another_reply_with_the_same_logits(parameters):
    pair = Pair.of(artifact(11, 384, parameters=parameters))
    query = pair.session.encrypt(unit_rows(1, 384)[0])
    replies = [pair.answer(query) for _ in range(3)]
    parsed = [parse(pair, query, reply) for reply in replies]
    masks = [polynomial.c1 for message in parsed for polynomial in message.polynomials]
    for index, first in enumerate(masks):
        for second in masks[:index]:
            assert (first == second).mean() < 0.01
    logits = [pair.session.decrypt(query, reply) for reply in replies]
    bound = pair.artifact.manifest.head.error_bound
    assert all(np.abs(found - logits[0]).max() <= 2 * bound for found in logits)


@pytest.mark.parametrize("parameters", ["standard", "compact"])
def test_the_masks_of_a_zero_head_are_as_random(parameters):
    pair = Pair.of(head_of(np.zeros((2, 384)), np.zeros(2), parameters))
    query = pair.session.encrypt(unit_rows(1, 384)[0])
    first, second = (parse(pair, query, pair.answer(query)).polynomials[0].c1 for _ in range(2))
    assert (first == second).mean() < 0.01
    bits = pair.artifact.manifest.head.reply_bits
    assert abs(first.astype(float).mean() / 2**bits - 0.5) < 0.05


def test_queries_of_other_models_keys_and_sets_are_refused():
    first, second = Pair.of(artifact(3, 64, seed=1)), Pair.of(artifact(3, 64, seed=2))
    compact = Pair.of(artifact(3, 64, parameters="compact"))
    row = unit_rows(1, 64)[0]
    query = first.session.encrypt(row)
    key = ClientKey.from_message(query.key.message)
    with pytest.raises(ModelMismatchError):
        second.head.evaluate(query.data, key)
    other = ClientKey.from_message(second.session.encrypt(row).key.message)
    with pytest.raises(KeyMismatchError):
        first.head.evaluate(query.data, other)
    compact_query = compact.session.encrypt(row)
    compact_key = ClientKey.from_message(compact_query.key.message)
    with pytest.raises(ParameterMismatchError):
        first.head.evaluate(query.data, compact_key)
    with pytest.raises(ParameterMismatchError):
        first.head.evaluate(compact_query.data, key)


# --- truncation ---------------------------------------------------------------------------------


def exact(values, modulus, bits):
    """round(2^bits c / Q) modulo 2^bits, and the distance to the next tie, in whole numbers."""
    rounded = [((value << (bits + 1)) + modulus) // (2 * modulus) % (1 << bits) for value in values]
    ties = [abs(((value << bits) % modulus) / modulus - 0.5) for value in values]  # 0 at a tie
    return np.array(rounded, dtype=np.int64), np.array(ties)


def check_truncation(values, parameters, bits):
    modulus = parameters.prime
    found = truncate(np.array(values, dtype=np.uint64), parameters, bits).astype(np.int64)
    expected, ties = exact(values, modulus, bits)
    difference = (found - expected + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
    assert np.abs(difference).max() <= 1
    assert (difference[ties > 2.0**-20] == 0).all()
    return ties


@pytest.mark.parametrize("parameters", [STANDARD, COMPACT], ids=["standard", "compact"])
@pytest.mark.parametrize("bits", [21, 24, 27])
def test_truncation_rounds_as_whole_numbers_do(parameters, bits):
    modulus = parameters.prime
    random = np.random.default_rng(bits)
    values = [int.from_bytes(random.bytes(16), "little") % modulus for _ in range(20_000)]
    ties = check_truncation(values, parameters, bits)
    assert (ties > 2.0**-20).mean() > 0.99


@pytest.mark.parametrize("parameters", [STANDARD, COMPACT], ids=["standard", "compact"])
def test_truncation_at_the_edges(parameters):
    modulus, bits = parameters.prime, 27
    step = modulus >> bits
    values = [0, 1, modulus - 1, modulus // 2, modulus // 2 + 1, step, step - 1, step + 1]
    values += [modulus - step // 2 + offset for offset in (-1000, 1000)]
    check_truncation(values, parameters, bits)
    near_ties = [
        ((2 * unit + 1) * modulus >> (bits + 1)) + offset
        for unit in (0, 1, 2**20, 2**26, 2**27 - 1)
        for offset in (-(step >> 10), -1, 0, 1, step >> 10)
    ]
    check_truncation(near_ties, parameters, bits)


def test_the_top_of_the_range_wraps_to_zero():
    for parameters in (STANDARD, COMPACT):
        largest = np.array([parameters.prime - 1], dtype=np.uint64)
        assert truncate(largest, parameters, 27).tolist() == [0]


# --- what is not there --------------------------------------------------------------------------


def test_no_evaluation_keys_are_made_anywhere():
    packages = (veilhead, veilhead_models, veilhead_protocol, veilhead_service)
    sources = [path for package in packages for path in Path(package.__file__).parent.rglob("*.py")]
    assert len(sources) > 20
    for path in sources:
        text = path.read_text().lower()
        for word in ("galois", "relin"):
            assert word not in text, path


def test_nothing_of_the_head_is_shown():
    head = artifact(5, 64)
    pair = Pair.of(head)
    assert repr(pair.head) == f"EncryptedHead('model', {head.manifest.digest.hex()[:12]})"
    for shown in (repr(pair.head), str(pair.head), f"{pair.head}"):
        assert "array" not in shown
        assert "Plaintext" not in shown
        assert not any(f"{value:.3f}" in shown for value in head.weight.ravel())


# --- the arithmetic of many texts -----------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 15, 20, 27])
@pytest.mark.parametrize("prime", [STANDARD.prime, COMPACT.prime])
def test_matrix_products_modulo_a_prime_are_exact(bits, prime):
    random = np.random.default_rng(bits)
    integers = random.integers(-(2**bits), 2**bits, size=(3, 40), endpoint=True)
    integers[0] = 2**bits  # the largest sums
    residues = random.integers(0, prime, size=(40, 1200), dtype=np.uint64)
    residues[:, 0] = prime - 1
    found = multiply_modulo(integers.astype(np.float64), residues, prime)
    expected = (integers.astype(object) @ residues.astype(object)) % prime
    assert (found == expected).all()


@pytest.mark.parametrize("parameters", ["standard", "compact"])
def test_the_flood_is_uniform_between_its_bounds(parameters):
    served = Pair.of(artifact(3, 8, parameters=parameters)).head
    bound = 2**served._scales.flood_bits
    drawn = served._flood(40_000)
    assert -bound <= drawn.min() < -0.999 * bound
    assert 0.999 * bound < drawn.max() < bound
    counts, _ = np.histogram(drawn, bins=16, range=(-bound, bound))
    assert np.abs(counts - 2500).max() < 250  # five deviations
    assert np.abs(np.bincount(drawn & 15) - 2500).max() < 250
    assert len(set(drawn.tolist())) == 40_000 or parameters == "standard"


@pytest.mark.parametrize("parameters", ["standard", "compact"])
def test_shifts_in_ntt_form_are_products_with_powers_of_x(parameters):
    made = artifact(1, 8, parameters=parameters).manifest.parameter_set
    seal = seal_io.runtime(made)
    shape, prime = (2, made.poly_modulus_degree), np.uint64(made.prime)
    plain = np.random.default_rng(3).integers(0, prime, size=shape, dtype=np.uint64)
    ciphertext = seal_io.load_ciphertext(seal, plain, scale_bits=0, ntt_form=False)
    seal.evaluator.transform_to_ntt_inplace(ciphertext)
    rows = np.zeros((1, 4, *shape), dtype=np.uint64)
    rows[0, 0] = seal_io.save_ciphertext(seal, ciphertext)
    seal_io.shift_residues(made, rows)
    back = seal_io.load_ciphertext(seal, rows[0, 3], scale_bits=0)
    seal.evaluator.transform_from_ntt_inplace(back)
    expected = np.roll(plain, 3, axis=-1)
    expected[..., :3] = (prime - expected[..., :3]) % prime
    assert np.array_equal(seal_io.save_ciphertext(seal, back), expected)
