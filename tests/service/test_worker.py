"""What a worker does between two queries: zeros that are encrypted ahead, each used once."""

from __future__ import annotations

import os

import numpy as np
import pytest
from support.copies import WAYS, in_copy, in_every_way
from support.heads import artifact, unit_rows

from veilhead.session import Session
from veilhead_protocol import copies, seal_io
from veilhead_protocol.wire import ReplyMessage
from veilhead_service.encrypted_head import ClientKey
from veilhead_service.worker import KEYS_AHEAD, ZEROS_AHEAD, Evaluator

CLASSES = 16  # two reply polynomials


class Bench:
    """An evaluator with one model, and a client of it."""

    def __init__(self, directory, classes=CLASSES, **options):
        self.artifact = artifact(classes, 384)
        self.artifact.save(directory)
        self.directory = os.fsencode(directory)
        self.manifest = self.artifact.manifest
        self.session = Session(self.manifest)
        self.evaluator = Evaluator(**options)

    def ask(self, query):
        key = query.key
        return self.evaluator.evaluate(
            self.manifest.digest, self.directory, key.id, key.message, query.data
        )

    def masks(self, query):
        """The second halves of the reply's polynomials."""
        reply = ReplyMessage.deserialize(
            self.ask(query),
            self.manifest.parameter_set,
            query.layout,
            self.manifest.scales.reply_bits,
            model_digest=self.manifest.digest,
            key_id=query.key.id,
            query_digest=query.digest,
        )
        return [polynomial.c1 for polynomial in reply.polynomials]

    def prepare(self):
        """Prepare all that there is to prepare: how many zeros."""
        count = 0
        while self.evaluator.prepare():
            count += 1
        return count


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "model")


def equal_masks(bench):
    """Pairs of equal masks among answers to one query, with and without zeros made ahead."""
    query = bench.session.encrypt(unit_rows(1, 384)[0])
    masks = bench.masks(query)
    for prepared in (True, True, False, False, True):
        if prepared:
            bench.prepare()
        masks += bench.masks(query)
    return sum(
        bool((first == second).all())
        for number, first in enumerate(masks)
        for second in masks[:number]
    )


def test_no_zero_is_used_twice_however_it_was_made(bench, monkeypatch):
    assert equal_masks(bench) == 0
    # With a zero that stays, answers to the same query repeat their masks.
    seal = seal_io.runtime(bench.manifest.parameter_set)
    kept = {}

    def stays(self):
        if self.id not in kept:
            kept[self.id] = seal_io.save_ciphertext(seal, self._encrypt_zero())
        return seal_io.load_ciphertext(seal, kept[self.id], scale_bits=0)

    monkeypatch.setattr(ClientKey, "zero", stays)
    assert equal_masks(bench) > 0


def equal_masks_across_a_copy(bench, way):
    """Pairs of equal masks of a worker and of its copy, in answers to one query."""
    query = bench.session.encrypt(unit_rows(1, 384)[0])
    _ = query.data  # both are sent the same

    def work(way):
        bench.ask(query)
        bench.prepare()
        theirs = in_copy(way, lambda: bench.masks(query))
        return bench.masks(query), theirs

    ours, theirs = in_every_way(way, work)
    return sum(bool((one == other).all()) for one in ours for other in theirs)


@pytest.mark.parametrize("way", [*WAYS, "same-id"])
def test_a_worker_that_does_not_notice_a_copy_uses_its_masks_twice(bench, way, monkeypatch):
    monkeypatch.setattr(copies._WATCH, "mark", lambda: 1)
    assert equal_masks_across_a_copy(bench, way) == 2  # reply polynomials


@pytest.mark.parametrize("way", [*WAYS, "same-id"])
def test_no_mask_of_a_copied_worker_occurs_twice(bench, way):
    assert equal_masks_across_a_copy(bench, way) == 0


def test_a_worker_may_be_told_to_make_nothing_ahead(tmp_path):
    bench = Bench(tmp_path / "model", zeros_ahead=0)
    query = bench.session.encrypt(unit_rows(1, 384)[0])
    for _ in range(2):
        bench.ask(query)
        assert bench.prepare() == 0
    assert bench.evaluator._keys[query.key.id]._ahead._values == []


def test_answers_are_right_with_zeros_that_were_made_ahead(bench):
    rows = unit_rows(6, 384)
    expected = bench.artifact.logits(rows)
    for row, logits in zip(rows, expected, strict=True):
        query = bench.session.encrypt(row)
        found = bench.session.decrypt(query, bench.ask(query))
        assert np.abs(found - logits).max() <= bench.manifest.head.error_bound
        assert bench.prepare() == query.layout.replies


def test_as_many_zeros_are_prepared_as_the_next_query_needs(bench):
    assert bench.prepare() == 0
    query = bench.session.encrypt(unit_rows(1, 384)[0])
    bench.ask(query)
    assert bench.prepare() == query.layout.replies == 2
    assert bench.prepare() == 0
    bench.ask(query)
    assert bench.prepare() == 2


def test_a_large_head_has_some_prepared_and_the_rest_made_as_it_goes(tmp_path):
    bench = Bench(tmp_path / "model", classes=2500)
    (row,) = unit_rows(1, 384)
    for _ in range(2):
        query = bench.session.encrypt(row)
        assert query.layout.replies > ZEROS_AHEAD
        found = bench.session.decrypt(query, bench.ask(query))
        expected = bench.artifact.logits(row[np.newaxis])[0]
        assert np.abs(found - expected).max() <= bench.manifest.head.error_bound
        assert bench.prepare() == ZEROS_AHEAD


def test_nothing_is_prepared_for_a_key_that_is_used_once(tmp_path):
    bench = Bench(tmp_path / "model")
    block = bench.session.encrypt_batch(unit_rows(2, 384))
    single = Session(bench.manifest, fresh_keys=True).encrypt(unit_rows(1, 384)[0])
    for query in (block, single):
        assert query.carries_key
        bench.ask(query)
        assert bench.prepare() == 0
    assert not bench.evaluator._keys  # nor is it kept


def test_zeros_are_held_for_the_last_keys_only(bench):
    sessions = [Session(bench.manifest) for _ in range(KEYS_AHEAD + 3)]
    (row,) = unit_rows(1, 384)
    queries = [session.encrypt(row) for session in sessions]
    keys = []
    for query in queries:
        bench.ask(query)
        bench.prepare()
        keys.append(bench.evaluator._keys[query.key.id])
    held = [len(key._ahead) for key in keys]
    assert held == [0] * 3 + [2] * KEYS_AHEAD
    bench.ask(queries[0])  # a key that was forgotten is served all the same
    assert bench.prepare() == 2
