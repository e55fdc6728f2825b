"""Attacks of a service on the client's key and text.

Each attack succeeds against the client with one protection taken out, which shows that it is an
attack, and fails against the client as it is.
"""

from __future__ import annotations

import copy
import hashlib
import pickle

import httpx2
import numpy as np
import pytest
from support.copies import WAYS, in_copy, in_every_way
from support.heads import Pair, artifact, unit_rows
from tenseal import sealapi

from veilhead import BatchError, Client
from veilhead.session import SecretKey, Session
from veilhead_benchmarks.attacks import ring
from veilhead_benchmarks.attacks.key_recovery import recover_secret, secret_of
from veilhead_protocol import copies, seal_io
from veilhead_protocol.copies import MadeAhead
from veilhead_protocol.errors import ReplyError, WireError
from veilhead_protocol.parameters import STANDARD
from veilhead_protocol.wire import (
    DIGEST_BYTES,
    REPLY_HEADER_BYTES,
    QueryHeader,
    QueryMessage,
    ReplyMessage,
    ReplyPolynomial,
)

PRIME = STANDARD.prime
DEGREE = STANDARD.poly_modulus_degree


# --- the secret key by linear algebra from returned logits ---------------------------------------


@pytest.fixture(scope="module")
def wide():
    return artifact(77, 384, parameters="compact")  # its key is the shorter one to solve for


def test_unrounded_logits_give_the_whole_key(wide, monkeypatch):
    monkeypatch.setattr("veilhead_protocol.decryption.round_logits", lambda served, scales: served)
    pair = Pair.of(wide)
    found = recover_secret(pair, 30, rounded=True)
    secret = secret_of(pair.session._key)
    assert (found == secret).all()


def test_returned_logits_do_not_give_the_key(wide):
    pair = Pair.of(wide)
    found = recover_secret(pair, 30, rounded=True)
    secret = secret_of(pair.session._key)
    assert found is not None
    # Guessing which coefficients are zero is right half of the time.
    assert 0.4 < np.mean((found != 0) == (secret != 0)) < 0.6


def test_rounding_after_the_multiplication_is_no_rounding_and_gives_the_whole_key(monkeypatch):
    """A head of large logits is served divided by 2^k: its step would be finer than a reply's."""
    large = artifact(77, 384, scale=512.0, parameters="compact")
    assert large.manifest.head.downscale_bits >= 8

    def swapped(served, scales):
        logits = np.ldexp(served, scales.downscale_bits)
        return np.rint(logits * 2**12) / 2**12

    pair = Pair.of(large)
    found = recover_secret(pair, 30, rounded=True)
    assert 0.4 < np.mean((found != 0) == (secret_of(pair.session._key) != 0)) < 0.6
    monkeypatch.setattr("veilhead_protocol.decryption.round_logits", swapped)
    pair = Pair.of(large)
    found = recover_secret(pair, 30, rounded=True)
    assert (found == secret_of(pair.session._key)).all()


def test_logits_are_multiples_of_the_step(wide):
    pair = Pair.of(wide)
    query = pair.session.encrypt(unit_rows(1, 384)[0])
    logits = pair.session.decrypt(query, pair.answer(query))
    assert (logits * 2**12 == np.rint(logits * 2**12)).all()


# --- the same seed twice --------------------------------------------------------------------------


def embedding_difference(pair):
    """x - x' from two queries under one key, without the key, and what it should be."""
    first, second = unit_rows(2, 384)
    queries = [pair.session.encrypt(row) for row in (first, second)]
    assert queries[0].key is queries[1].key
    return difference_of(pair, *(query.data for query in queries)), first - second


def difference_of(pair, *queries):
    """x - x' [384] if both messages are over one zero."""
    seal = seal_io.runtime(STANDARD)
    found = []
    for query in queries:
        message = QueryMessage.deserialize(query, STANDARD, pair.head.layout)
        c0 = message.polynomials[0].c0
        ciphertext = seal_io.load_ciphertext(seal, np.stack([c0, c0]), scale_bits=30)
        seal.evaluator.transform_from_ntt_inplace(ciphertext)
        found.append(seal_io.save_ciphertext(seal, ciphertext)[0].astype(object))
    scale = 2.0**pair.artifact.manifest.scales.query_scale_bits
    gap = np.array(ring.centred((found[0] - found[1]) % PRIME, PRIME), dtype=float) / scale
    return gap[:384]


def test_the_same_seed_twice_gives_the_difference_of_two_embeddings(monkeypatch):
    pair = Pair.of(artifact(5, 384))
    key = pair.session._fresh_enough_key()
    # SEAL with a generator of a fixed seed draws the same randomness every time.
    fixed = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
    fixed.set_poly_modulus_degree(DEGREE)
    fixed.set_coeff_modulus([sealapi.Modulus(PRIME)])
    fixed.set_random_generator(sealapi.Blake2xbPRNGFactory([7] * 8))
    context = sealapi.SEALContext(fixed, True, sealapi.SEC_LEVEL_TYPE.TC128)
    secret = sealapi.KeyGenerator(context).secret_key()
    key._encryptor = sealapi.Encryptor(context, secret)
    found, wanted = embedding_difference(pair)
    assert np.abs(found - wanted).max() < 1e-7


def test_two_queries_do_not_give_the_difference_of_their_embeddings():
    found, wanted = embedding_difference(Pair.of(artifact(5, 384)))
    assert np.abs(found - wanted).max() > 1


class Kept(MadeAhead):
    """Zeros that are used and not taken out."""

    def take(self, make):
        zero = super().take(make)
        self.add(zero)
        return zero


def test_a_zero_made_ahead_and_used_twice_gives_the_same_difference():
    pair = Pair.of(artifact(5, 384))
    pair.session._fresh_enough_key()._zeros = Kept()
    pair.session.prepare()
    found, wanted = embedding_difference(pair)
    assert np.abs(found - wanted).max() < 1e-7


def test_zeros_made_ahead_do_not_give_the_difference_of_two_embeddings():
    pair = Pair.of(artifact(5, 384))
    pair.session.prepare()
    found, wanted = embedding_difference(pair)
    assert np.abs(found - wanted).max() > 1


@pytest.mark.parametrize("ahead", [False, True])
def test_no_seed_occurs_twice(ahead):
    pair = Pair.of(artifact(4, 3000))  # three polynomials a query
    seeds = set()
    for row in unit_rows(20, 3000):
        if ahead:
            pair.session.prepare()
        query = pair.session.encrypt(row)
        message = QueryMessage.deserialize(query.data, STANDARD, pair.head.layout)
        seeds |= {polynomial.seed for polynomial in message.polynomials}
        seeds.add(query.key.message[-64:])
    assert len(seeds) == 61  # one key, sixty polynomials


# --- a process that was copied --------------------------------------------------------------------


def notice_nothing(monkeypatch):
    """A client that takes a copy of its process for the process itself."""
    monkeypatch.setattr(copies._WATCH, "mark", lambda: 1)


def difference_across_a_copy(way, encrypt):
    """x - x' from a query of each process, without the key, and what it should be.

    `encrypt(pair)` gives what encrypts a row [384] to a message, after zeros were made ahead.
    """
    first, second = unit_rows(2, 384)
    pair = Pair.of(artifact(5, 384))

    def work(way):
        pair.session.prepare()
        of_row = encrypt(pair)
        theirs = in_copy(way, lambda: of_row(second))
        return of_row(first), theirs

    ours, theirs = in_every_way(way, work)
    return difference_of(pair, ours, theirs), first - second


def by_the_session(pair):
    """What a program does that knows the session only."""
    return lambda row: pair.session.encrypt(row).data


def by_a_query_begun_before(pair):
    """Queries whose bytes are first asked for after the copy, under the key from before it."""
    queries = {row.tobytes(): pair.session.encrypt(row) for row in unit_rows(2, 384)}
    return lambda row: queries[row.tobytes()].data


ENCRYPTIONS = [by_the_session, by_a_query_begun_before]


@pytest.mark.parametrize("encrypt", ENCRYPTIONS)
@pytest.mark.parametrize("way", [*WAYS, "same-id"])
def test_a_client_that_does_not_notice_a_copy_gives_the_difference_of_two_embeddings(
    way, encrypt, monkeypatch
):
    notice_nothing(monkeypatch)
    found, wanted = difference_across_a_copy(way, encrypt)
    assert np.abs(found - wanted).max() < 1e-7


@pytest.mark.parametrize("encrypt", ENCRYPTIONS)
@pytest.mark.parametrize("way", [*WAYS, "same-id"])
def test_a_copied_process_does_not_give_the_difference_of_two_embeddings(way, encrypt):
    found, wanted = difference_across_a_copy(way, encrypt)
    assert np.abs(found - wanted).max() > 1


def test_a_copied_process_makes_a_key_of_its_own():
    pair = Pair.of(artifact(3, 16))
    row = unit_rows(1, 16)[0]
    before = pair.session.encrypt(row).key.id
    theirs = in_copy("fork", lambda: [pair.session.encrypt(row).key.id for _ in range(2)])
    assert theirs[0] == theirs[1] != before
    assert pair.session.encrypt(row).key.id == before


@pytest.mark.parametrize("way", WAYS)
def test_seal_draws_fresh_randomness_in_every_copy(way):
    """Objects of SEAL from before the copy included: it seeds a generator for every encryption."""
    seal = seal_io.runtime(STANDARD)
    secret = sealapi.KeyGenerator(seal.context).secret_key()
    encryptor = sealapi.Encryptor(seal.context, secret)

    def drawn():
        """What fresh keys and encryptions are told apart by."""
        zero = encryptor.encrypt_zero_symmetric(seal.parms_id)
        _, _, seed = seal_io.save_seeded(seal, zero)
        return [seed, SecretKey(STANDARD).message]

    drawn()  # whatever is set up once is set up now
    found = [*in_copy(way, drawn), *in_copy(way, drawn), *drawn()]
    assert len(set(found)) == len(found)


# --- crafted replies ------------------------------------------------------------------------------


class MaliciousService(httpx2.AsyncBaseTransport):
    """Answers every query with a reply of its own making, and watches what the client does."""

    def __init__(self, manifest):
        self.manifest = manifest
        self.requests = []
        self.position = 0

    async def handle_async_request(self, request):
        self.requests.append((request.method, request.url.path))
        if request.method == "GET":
            return httpx2.Response(200, content=self.manifest.serialize())
        body = await request.aread()
        if request.method != "POST":
            return httpx2.Response(201)
        return httpx2.Response(200, content=self.craft(body))

    def craft(self, query):
        """A reply that decrypts to a huge logit where one coefficient of the secret is not zero."""
        manifest = self.manifest
        header = QueryHeader.deserialize(query)
        layout = manifest.layout_of(header.counts.texts)
        polynomials = []
        for index in range(layout.replies):
            wanted = layout.wanted(index)
            c1 = np.zeros(DEGREE, dtype=np.uint64)
            # The secret's coefficient at `position` meets this one at the first wanted place.
            c1[(int(wanted[0]) - self.position) % DEGREE] = 1 << (manifest.head.reply_bits - 1)
            polynomials.append(ReplyPolynomial(np.zeros(len(wanted), dtype=np.uint64), c1))
        return ReplyMessage(
            parameters=manifest.parameter_set,
            model_digest=header.model_digest,
            key_id=header.key_id,
            layout=layout,
            reply_bits=manifest.head.reply_bits,
            query_digest=hashlib.sha256(query).digest(),
            polynomials=tuple(polynomials),
        ).serialize()


def observe(positions):
    """For each position: what the service saw of the client, and whether the user saw an error.

    Gives these with the secret's coefficients at the positions, under one key.
    """
    manifest = artifact(1, 384).manifest  # one logit, which meets one coefficient
    service = MaliciousService(manifest)
    sights = []
    with Client("http://127.0.0.1", "model", transport=service) as client:
        for position in positions:
            service.position = position
            service.requests.clear()
            try:
                client.logits(unit_rows(1, 384))
                error = False
            except BatchError:
                error = True
            sights.append((tuple(request for request in service.requests), error))
        key = client._engine.session._key
        secret = secret_of(key)
    posts = [(sum(method == "POST" for method, _ in requests), error) for requests, error in sights]
    return posts, [int(secret[position]) for position in positions]


def refuse_implausible_logits(monkeypatch):
    """The helpful check that must not exist: logits come nowhere near 2^e, so one that does is
    an error."""
    decrypt = Session.decrypt_batch

    def checked(self, query, reply):
        logits = decrypt(self, query, reply)
        if np.abs(logits).max() >= 0.9 * 2.0**self._scales.served_exponent:
            raise WireError("implausible logits")
        return logits

    monkeypatch.setattr(Session, "decrypt_batch", checked)


def test_a_client_that_checks_decrypted_values_gives_away_the_key_bit_by_bit(monkeypatch):
    refuse_implausible_logits(monkeypatch)
    sights, secret = observe(range(40))
    assert [error for _, error in sights] == [coefficient != 0 for coefficient in secret]


def test_crafted_replies_change_nothing_that_the_service_or_the_user_sees():
    sights, secret = observe(range(40))
    assert 0 < sum(coefficient != 0 for coefficient in secret) < 40
    assert set(sights) == {(1, False)}


def test_a_reply_with_a_wrong_header_is_refused_once_all_is_sent_and_never_asked_for_again():
    service = MaliciousService(artifact(5, 384).manifest)
    craft = service.craft
    service.craft = lambda query: with_other_hash(craft(query))
    with (
        Client("http://127.0.0.1", "model", transport=service) as client,
        pytest.raises(BatchError) as caught,
    ):
        client.logits(unit_rows(3, 384))
    assert all(isinstance(error, ReplyError) for error in caught.value.errors.values())
    assert len(caught.value.errors) == 3
    assert sum(method == "POST" for method, _ in service.requests) == len(
        Session(service.manifest).plan(3)
    )


def with_other_hash(reply):
    start = REPLY_HEADER_BYTES - DIGEST_BYTES
    return reply[:start] + bytes(DIGEST_BYTES) + reply[REPLY_HEADER_BYTES:]


# --- requests of several texts --------------------------------------------------------------------


def test_every_request_of_several_texts_has_a_key_of_its_own():
    """One crafted reply whose labels become visible may give away the key of that request."""
    pair = Pair.of(artifact(5, 384))
    single = pair.session.encrypt(unit_rows(1, 384)[0])
    batches = [pair.session.encrypt_batch(unit_rows(4, 384)) for _ in range(3)]
    assert len({query.key.id for query in (single, *batches)}) == 4
    assert pair.session.encrypt(unit_rows(1, 384)[0]).key is single.key


@pytest.mark.parametrize("texts", [4, 64])
def test_logits_of_several_texts_are_multiples_of_the_step(texts):
    pair = Pair.of(artifact(5, 384))
    rows = unit_rows(texts, 384)
    query = pair.session.encrypt_batch(rows)
    logits = pair.session.decrypt_batch(query, pair.answer(query))
    assert (logits * 2**12 == np.rint(logits * 2**12)).all()
    expected = rows @ pair.artifact.weight.T + pair.artifact.bias
    assert np.abs(logits - expected).max() <= pair.artifact.manifest.head.error_bound


def test_the_engine_sends_several_texts_under_fresh_keys():
    service = MaliciousService(artifact(5, 384).manifest)
    keys = []

    def craft(query):
        header = QueryHeader.deserialize(query)
        if header.counts.texts > 1:
            keys.append(header.key_id)
        return b""

    service.craft = craft
    with (
        Client("http://127.0.0.1", "model", transport=service) as client,
        pytest.raises(BatchError),
    ):
        client.logits(unit_rows(256, 384))
    assert len(keys) > 1
    assert len(set(keys)) == len(keys)


# --- what a key gives away of itself --------------------------------------------------------------


def test_a_key_can_be_neither_pickled_nor_copied_nor_read_from_its_repr():
    key = SecretKey(STANDARD)
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="secret key"):
            attempt(key)
    assert repr(key) == f"SecretKey(id={key.id.hex()[:12]})"


def test_a_row_that_is_not_finite_looks_like_any_other_to_the_service():
    service = MaliciousService(artifact(5, 384).manifest)
    rows = unit_rows(3, 384)
    rows[1, 7] = np.nan
    with (
        Client("http://127.0.0.1", "model", transport=service) as client,
        pytest.raises(BatchError) as caught,
    ):
        client.logits(rows)
    assert list(caught.value.errors) == [1]
    assert sum(method == "POST" for method, _ in service.requests) == len(
        Session(service.manifest).plan(3)
    )
