"""Attacks of a client on the head.

Each attack succeeds against the service with one protection taken out, which shows that it is an
attack, and fails against the service as it is.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest
from support.heads import Pair, artifact, unit_rows

from veilhead_benchmarks.attacks import ring
from veilhead_benchmarks.attacks.crafted_messages import (
    TrustingC1,
    Watched,
    WithoutZero,
    divide_reply_by_query,
    integer_weights,
    send_chosen_messages,
    share_recovered,
)
from veilhead_protocol import seal_io
from veilhead_protocol.errors import MessageLayoutError, MessageLengthError, SeedReuseError
from veilhead_protocol.layout import block_sizes
from veilhead_protocol.manifest import PolicySection
from veilhead_protocol.parameters import STANDARD
from veilhead_protocol.scales import served_weight
from veilhead_protocol.wire import (
    QueryMessage,
    ReplyMessage,
    ReplyPolynomial,
)
from veilhead_service.encrypted_head import ClientKey, EncryptedHead

PRIME = STANDARD.prime
DEGREE = STANDARD.poly_modulus_degree


@pytest.fixture
def pair():
    return Pair.of(artifact(5, 384))


def nothing(head):
    """A trivial encryption of zero, of the scale of sums: to add it is to copy."""
    zeros = np.zeros((2, DEGREE), dtype=np.uint64)
    return seal_io.load_ciphertext(head._seal, zeros, scale_bits=head._scales.scale_bits)


def weight_polynomials(pair):
    """The weight polynomials of one piece: [R, N]."""
    packed = pair.head.layout.pack_weight(pair.artifact.weight)[:, 0]
    return np.pad(packed, ((0, 0), (0, DEGREE - packed.shape[1])))


def ciphertext_of(pair, query):
    """The SEAL ciphertext of a query of one polynomial."""
    message = QueryMessage.deserialize(query.data, STANDARD, pair.head.layout)
    (polynomial,) = message.polynomials
    return seal_io.load_seeded_ciphertext(
        seal_io.runtime(STANDARD),
        polynomial.c0,
        polynomial.seed,
        prng=message.prng,
        ntt_form=True,
        scale_bits=pair.artifact.manifest.scales.query_scale_bits,
    )


def expanded_c1(pair, query):
    """c1 of the query as coefficients: the attacker knows its seed."""
    ciphertext = ciphertext_of(pair, query)
    seal_io.runtime(STANDARD).evaluator.transform_from_ntt_inplace(ciphertext)
    return seal_io.save_ciphertext(seal_io.runtime(STANDARD), ciphertext)[1]


def parse_reply(pair, query_bytes, key_id, reply):
    return ReplyMessage.deserialize(
        reply,
        STANDARD,
        pair.head.layout,
        pair.artifact.manifest.head.reply_bits,
        model_digest=pair.artifact.manifest.digest,
        key_id=key_id,
        query_digest=hashlib.sha256(query_bytes).digest(),
    )


# --- dividing the reply by the query ------------------------------------------------------------


def test_division_takes_the_head_from_a_service_that_does_not_rerandomise(pair):
    pair = Pair.of(pair.artifact, WithoutZero)
    assert (divide_reply_by_query(pair) == integer_weights(pair)).all()


def test_division_finds_nothing(pair):
    pair = Pair.of(pair.artifact, Watched)
    assert share_recovered(divide_reply_by_query(pair), integer_weights(pair)) < 0.01


def test_a_zero_used_twice_gives_the_difference_of_two_weight_polynomials(monkeypatch):
    """Why the encryption of zero is fresh for every reply polynomial."""
    pair = Pair.of(artifact(16, 384))  # two weight polynomials

    def difference():
        seen = []
        truncate = pair.head._truncate
        monkeypatch.setattr(pair.head, "_truncate", lambda v: seen.append(v) or truncate(v))
        query = pair.session.encrypt(unit_rows(1, 384)[0])
        pair.answer(query)
        monkeypatch.setattr(pair.head, "_truncate", truncate)
        first, second = next(value for value in seen if value.shape == (2, DEGREE))
        gap = (first.astype(object) - second.astype(object)) % PRIME
        return ring.centred(ring.divide(gap, expanded_c1(pair, query), PRIME), PRIME)

    bits = pair.artifact.manifest.scales.weight_scale_bits
    packed = np.rint(weight_polynomials(pair) * 2.0**bits)
    wanted = (packed[0] - packed[1]).astype(int)
    assert share_recovered(difference(), wanted) < 0.01

    kept, mask = {}, EncryptedHead._mask

    def reuse(self, key):
        if "zero" not in kept:
            kept["zero"] = mask(self, key)
        total = self._seal.new_ciphertext()
        self._seal.evaluator.add(kept["zero"], nothing(self), total)
        return total

    monkeypatch.setattr(EncryptedHead, "_mask", reuse)
    assert (difference() == wanted).all()


# --- reading coefficients that are not logits -----------------------------------------------------


def decrypt_every_coefficient(pair, c0, c1):
    """c0 [N or fewer wanted] + c1 s for all coefficients, by the key's owner, over Delta_w."""
    scales = pair.artifact.manifest.scales
    modulus = 1 << scales.reply_bits
    kept = pair.session._key._decryption
    secret = np.rint((np.fft.ifft(kept._spectrum) * kept._back).real).astype(int)
    product = ring.centred(ring.multiply(c1, secret, PRIME), PRIME)
    values = ring.centred((product + c0.astype(object)) % modulus, modulus)
    unit = STANDARD.prime / 2.0 ** (scales.reply_bits + scales.scale_bits)
    return np.array(values, dtype=float) * unit


def read_all_coefficients(pair):
    """The query is the constant 1: the product is the weight polynomial itself."""
    query = pair.session.encrypt(np.eye(384)[0])
    key = ClientKey.from_message(query.key.message)
    message = QueryMessage.deserialize(query.data, STANDARD, pair.head.layout)
    (reply,) = pair.head._answer(pair.head.layout, pair.head._masked(message, key))
    c0 = np.zeros(DEGREE, dtype=np.uint64)
    if len(reply.c0) == DEGREE:
        c0 = reply.c0
    else:
        c0[pair.head.layout.wanted(0)] = reply.c0
    return decrypt_every_coefficient(pair, c0, reply.c1)


def answer_with_every_coefficient(self, layout, masked):
    for c0, c1 in masked:
        yield ReplyPolynomial(c0=self._truncate(c0), c1=self._truncate(c1))


def test_unwanted_coefficients_hold_the_whole_head_when_they_are_sent(pair, monkeypatch):
    monkeypatch.setattr(EncryptedHead, "_answer", answer_with_every_coefficient)
    found = read_all_coefficients(pair)
    assert share_recovered(found, weight_polynomials(pair)[0]) > 0.99


def test_unwanted_coefficients_tell_nothing_as_they_are_not_sent(pair):
    found = read_all_coefficients(pair)
    packed = weight_polynomials(pair)[0]
    unwanted = np.ones(DEGREE, dtype=bool)
    unwanted[pair.head.layout.wanted(0)] = False
    assert share_recovered(found[unwanted], packed[unwanted]) < 0.01
    # One logit a class, as an honest query gives it: here the first weight of each row plus bias.
    answers = found[pair.head.layout.wanted(0)]
    honest = pair.artifact.weight[:, 0] + pair.artifact.bias
    assert np.abs(answers - honest).max() < pair.artifact.manifest.head.error_bound


# --- a key message whose a the client chose -------------------------------------------------------


def test_a_chosen_key_and_a_chosen_query_take_the_head_from_a_service_that_trusts_them(pair):
    pair = Pair.of(pair.artifact, TrustingC1)
    assert share_recovered(send_chosen_messages(pair, trusted=True), integer_weights(pair)) > 0.99


def test_a_chosen_query_alone_finds_nothing_while_a_is_expanded(pair):
    pair = Pair.of(pair.artifact, TrustingC1)
    assert share_recovered(send_chosen_messages(pair, trusted=False), integer_weights(pair)) < 0.01


def test_a_chosen_key_finds_nothing(pair):
    assert share_recovered(send_chosen_messages(pair, trusted=False), integer_weights(pair)) < 0.01


def test_there_is_no_room_for_a_chosen_a(pair):
    query = pair.session.encrypt(unit_rows(1, 384)[0])
    explicit = query.key.message[:-64] + query.key.message[40:-64]  # b, and an a instead of a seed
    with pytest.raises(MessageLengthError):
        ClientKey.from_message(explicit)


# --- the flood --------------------------------------------------------------------------------


def residual_noise(pair, repeats):
    """What an honest client sees of noise: exact answer minus plaintext, over many queries."""
    scales = pair.artifact.manifest.scales
    embedding = unit_rows(1, 384)[0]
    exact = served_weight(pair.artifact.weight, scales) @ embedding
    noise = []
    for _ in range(repeats):
        query = pair.session.encrypt(embedding)
        message = parse_reply(pair, query.data, query.key.id, pair.answer(query))
        unit = STANDARD.prime / 2.0 ** (scales.reply_bits + scales.scale_bits)
        values = query.key.decrypt(message).reshape(-1)[:5] * unit
        noise.append(values - exact - pair.artifact.bias)
    return np.array(noise)


def test_the_flood_is_as_wide_as_the_manifest_says_and_covers_the_rest(pair, monkeypatch):
    flooded = residual_noise(pair, 40)
    bound = 2.0**-11
    assert np.abs(flooded).max() <= 1.25 * bound  # flood, noise and truncation
    assert 0.45 * bound < flooded.std() < 0.75 * bound  # uniform: 0.577
    monkeypatch.setattr(
        EncryptedHead, "_flood", lambda self, count: np.zeros(count, dtype=np.int64)
    )
    bare = residual_noise(pair, 40)
    assert bare.std() < flooded.std() / 8


# --- requests of several texts -------------------------------------------------------------------

BLOCKS = pytest.mark.parametrize("texts", [4, 16, 300, 4096], ids=["4", "block", "bulk", "all"])


def of_several(classes, dimensions):
    """A pair whose model takes any number of texts."""
    made = artifact(classes, dimensions)
    return Pair.of(replace(made, policy=PolicySection(bulk=True)))


def mask_gap(pair, query, monkeypatch):
    """c1 of the first two replies before the cut: their difference, [N], modulo the prime."""
    seen = []
    truncate = EncryptedHead._truncate
    with monkeypatch.context() as patched:
        patched.setattr(
            EncryptedHead,
            "_truncate",
            lambda self, value: seen.append(value) or truncate(self, value),
        )
        pair.answer(query)
    first, second = seen[-1][:2].astype(object)
    return (first - second) % PRIME


def expected_gap(pair, query):
    """The same difference if both had one mask: what the query and the weights make of it."""
    layout = query.layout
    seal = seal_io.runtime(STANDARD)
    message = QueryMessage.deserialize(query.data, STANDARD, layout)
    scale = 2.0**pair.artifact.manifest.scales.weight_scale_bits
    packed = np.rint(layout.pack_weight(pair.artifact.weight) * scale)
    packed = np.pad(packed, ((0, 0), (0, 0), (0, DEGREE - packed.shape[2]))).astype(int)
    total = np.zeros(DEGREE, dtype=object)
    for piece, polynomial in enumerate(message.polynomials):
        ciphertext = seal_io.load_seeded_ciphertext(
            seal, polynomial.c0, polynomial.seed, prng=1, ntt_form=True, scale_bits=0
        )
        seal.evaluator.transform_from_ntt_inplace(ciphertext)
        c1 = seal_io.save_ciphertext(seal_io.runtime(STANDARD), ciphertext)[1]
        total += np.array(
            ring.multiply(c1, packed[0, piece] - packed[1, piece], PRIME), dtype=object
        )
    return total % PRIME


@BLOCKS
def test_every_reply_of_a_request_has_a_mask_of_its_own(texts, monkeypatch):
    pair = of_several(200, 5)
    query = pair.session.encrypt_batch(unit_rows(texts, 5))
    assert query.layout.replies > 1
    gap = mask_gap(pair, query, monkeypatch)
    wanted = expected_gap(pair, query)
    assert (gap == wanted).mean() < 0.01

    kept, mask = {}, EncryptedHead._mask

    def reuse(self, key):
        if "zero" not in kept:
            kept["zero"] = mask(self, key)
        total = self._seal.new_ciphertext()
        self._seal.evaluator.add(kept["zero"], nothing(self), total)
        return total

    monkeypatch.setattr(EncryptedHead, "_mask", reuse)
    assert (mask_gap(pair, query, monkeypatch) == wanted).all()


@BLOCKS
def test_a_reply_carries_no_coefficient_but_the_logits(texts):
    pair = of_several(7, 20)
    query = pair.session.encrypt_batch(unit_rows(texts, 20))
    reply = ReplyMessage.deserialize(
        pair.answer(query),
        STANDARD,
        query.layout,
        pair.artifact.manifest.head.reply_bits,
        model_digest=pair.artifact.manifest.digest,
        key_id=query.key.id,
        query_digest=query.digest,
    )
    assert sum(len(polynomial.c0) for polynomial in reply.polynomials) == texts * 7


def test_a_block_stays_within_the_hints_and_bulk_needs_the_models_leave():
    made = artifact(7, 20)
    manifest = made.manifest
    most = manifest.shape.max_wanted
    for texts in (1, *block_sizes(manifest.shape)):
        layout = manifest.layout_of(texts)
        assert texts * layout.group <= most
    pair = of_several(7, 20)
    query = pair.session.encrypt_batch(unit_rows(most + 1, 20))
    strict = EncryptedHead(manifest, made.weight, made.bias)
    with pytest.raises(MessageLayoutError, match=f"at most {most}"):
        strict.evaluate(query.data, ClientKey.from_message(query.key.message))


@BLOCKS
def test_a_seed_twice_in_a_request_is_refused(texts):
    pair = of_several(200, 900)
    query = pair.session.encrypt_batch(unit_rows(texts, 900))
    assert query.layout.pieces > 1
    data = bytearray(query.data)
    start = len(query.header)
    stride = (len(data) - start) // query.layout.pieces
    data[-64:] = data[start + stride - 64 : start + stride]
    with pytest.raises(SeedReuseError):
        pair.head.evaluate(bytes(data), ClientKey.from_message(query.key.message))


@BLOCKS
@pytest.mark.parametrize("offset", range(108, 136, 4))
def test_a_layout_that_is_not_the_canonical_one_is_refused(texts, offset):
    pair = of_several(7, 20)
    query = pair.session.encrypt_batch(unit_rows(texts, 20))
    key = ClientKey.from_message(query.key.message)
    for change in (-1, 1):
        data = bytearray(query.data)
        (value,) = struct.unpack_from("<I", data, offset)
        struct.pack_into("<I", data, offset, value + change)
        try:
            pair.head.evaluate(bytes(data), key)
        except (MessageLayoutError, MessageLengthError):
            continue
        # Another number of texts may have the same counts, and the same polynomials: it is then
        # a request for so many texts, and canonical.
        assert offset == 108
