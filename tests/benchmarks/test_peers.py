"""Every peer that runs in this environment answers the head that it is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veilhead_benchmarks.heads import Head, measure
from veilhead_benchmarks.peers import concrete_ml, concrete_ml_side
from veilhead_benchmarks.peers.concrete_ml import PeerUnavailableError, concrete_ml_python
from veilhead_benchmarks.peers.plaintext import PlaintextExchange
from veilhead_benchmarks.peers.tenseal_batched import TensealBatchedExchange
from veilhead_benchmarks.peers.tenseal_bsgs import SLOTS, Plan, TensealBsgsExchange
from veilhead_benchmarks.peers.tenseal_mm import TensealMmExchange


@pytest.mark.parametrize(
    ("system", "exchange", "batch", "error"),
    [
        ("plaintext", PlaintextExchange, 3, 1e-5),
        ("tenseal-mm", TensealMmExchange, 2, 1e-4),
        ("tenseal-batched", TensealBatchedExchange, 5, 1e-4),
        ("tenseal-bsgs", TensealBsgsExchange, 2, 1e-3),
    ],
)
def test_a_peer_answers_the_head(system, exchange, batch, error):
    head = Head.random(3, 8)
    row = measure("single", system, exchange(head), head, batch=batch, calls=1)
    assert 0 <= row.max_error < error
    assert (row.d, row.classes, row.batch) == (8, 3, batch)
    assert row.total_ms == row.encrypt_ms + row.server_ms + row.decrypt_ms
    assert row.bytes_up > 0
    assert row.bytes_down > 0


def rotated(plan, weight, embedding):
    """What the slots hold, by the plan's rotations, in plain numbers."""
    packed = plan.pack_weight(weight)
    query = plan.pack_embedding(embedding)
    total = np.zeros(SLOTS, dtype=np.complex128)
    for giant, step in enumerate((0, *plan.giant_steps)):
        part = sum(
            np.roll(query, -turn) * packed[giant, baby]
            for baby, turn in enumerate((0, *plan.baby_steps))
        )
        total += np.roll(part, -step)
    for step in plan.gathering_steps:
        total = total + np.roll(total, -step)
    return total[plan.wanted(len(weight))].real


@given(st.integers(1, 300), st.integers(1, 120), st.integers(0, 2**32 - 1))
def test_baby_and_giant_steps_make_the_product(dimensions, classes, seed):
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(classes, dimensions))
    embedding = generator.normal(size=dimensions)
    plan = Plan.of(dimensions, classes)
    assert plan.baby * plan.giant == plan.products
    np.testing.assert_allclose(
        rotated(plan, weight, embedding), weight @ embedding, rtol=0, atol=1e-9
    )


def test_a_head_takes_only_the_rotations_that_it_needs():
    assert [Plan.of(384, classes).rotations for classes in (2, 20, 77)] == [8, 8, 10]
    assert (Plan.of(384, 2048).parts, Plan.of(384, 4096).parts) == (1, 2)
    with pytest.raises(ValueError, match="expected what fits 2048 slots"):
        Plan.of(5000, 2)


def test_only_the_keys_of_these_rotations_are_registered():
    few, many = (TensealBsgsExchange(Head.random(classes, 64)) for classes in (2, 500))
    assert few.bytes_keys / Plan.of(64, 2).rotations == pytest.approx(
        many.bytes_keys / Plan.of(64, 500).rotations, rel=0.02
    )


def test_more_texts_than_slots_are_refused():
    head = Head.random(2, 2)
    with pytest.raises(ValueError, match="at most 4096"):
        TensealBatchedExchange(head).encrypt(head.embeddings(4097))


def test_concrete_ml_says_which_python_it_needs(monkeypatch):
    monkeypatch.setattr(concrete_ml, "_PYTHONS", ())
    with pytest.raises(PeerUnavailableError, match=r"expected 3\.11 or 3\.12"):
        concrete_ml_python()


def test_the_side_of_concrete_ml_imports_nothing_of_this_project():
    assert "import veilhead" not in Path(concrete_ml_side.__file__).read_text("utf-8")
    assert "from veilhead" not in Path(concrete_ml_side.__file__).read_text("utf-8")
