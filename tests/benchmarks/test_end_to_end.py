"""Both ways from text to label, and what a trained head says, with a backbone made on the spot."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from support.backbones import WORDS, save_tiny_bert

from veilhead_benchmarks import end_to_end
from veilhead_benchmarks.end_to_end import Case, measure_end_to_end
from veilhead_benchmarks.fidelity import measure_fidelity, sampled
from veilhead_benchmarks.heads import Head
from veilhead_benchmarks.peers.plaintext import answer
from veilhead_models.backbone import Backbone, describe
from veilhead_models.datasets import Dataset, Split

TEXTS = tuple(f"{first} {second}" for first in WORDS for second in WORDS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Directory and section of a tiny backbone."""
    directory = tmp_path_factory.mktemp("backbone") / "tiny"
    save_tiny_bert(directory)
    return directory, describe(directory)


@pytest.fixture(scope="module")
def rows(tiny):
    return measure_end_to_end((Case(1, 3, 2), Case(5, 3, 1)), TEXTS, *tiny)


def test_each_case_has_a_row_for_either_way(rows):
    assert [(row.system, row.batch, row.classes) for row in rows] == [
        ("veilhead", 1, 3),
        ("plaintext", 1, 3),
        ("veilhead", 5, 3),
        ("plaintext", 5, 3),
    ]
    assert all(row.subject == "end-to-end" and row.total_ms > 0 for row in rows)


def test_the_encrypted_way_says_where_its_time_goes(rows):
    for row in rows[::2]:
        assert 0 < row.max_error < 2**-10 + 2**-13
        assert row.server_ms + row.encrypt_ms + row.decrypt_ms > 0
        assert row.bytes_up > 10_000
        assert "times plaintext" in row.note
    assert rows[1].bytes_up == 4 * 16


class _Fake:
    """Stands for either way; it answers with zeros and ones."""

    manifest = SimpleNamespace(head=SimpleNamespace(error_bound=2**-10))

    def embed(self, texts):
        return np.zeros((len(texts), 16))

    def logits(self, embeddings):
        return np.zeros((len(embeddings), 3))

    def classify(self, texts):
        return np.ones((len(texts), 3))


def test_a_twin_that_answers_otherwise_is_noticed():
    pair = end_to_end._Pair(Head.random(3, 16), _Fake(), _Fake(), [], TEXTS)
    with pytest.raises(RuntimeError, match="the two ways differ by 1, expected at most"):
        pair.measure(Case(2, 3, 1))


def test_the_twin_answers_in_plain_numbers():
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    bias = np.ones(3, dtype=np.float32)
    embeddings = np.array([[1, 0], [0, 1]], dtype="<f4")
    logits = np.frombuffer(answer(embeddings.tobytes(), weight, bias), "<f4").reshape(2, 3)
    assert (logits == weight + 1).all()


def dataset():
    targets = np.array([index % 3 for index in range(len(TEXTS))])
    return Dataset("made", Split(TEXTS, targets), Split(TEXTS, targets), ("a", "b", "c"), "", None)


def test_a_sample_has_as_many_rows_of_every_label():
    found = sampled(dataset(), 4, 7)
    assert np.bincount(found.train.targets).tolist() == [4, 4, 4]
    assert len(found.test.texts) == len(found.test.targets) == 7
    again = sampled(dataset(), 4, 7)
    assert again.train.texts == found.train.texts
    for split in (found.train, found.test):
        for text, target in zip(split.texts, split.targets, strict=True):
            assert TEXTS.index(text) % 3 == target


def test_a_trained_head_says_the_same_encrypted(tiny):
    backbone = Backbone.load(*tiny, device="cpu")
    (row,) = measure_fidelity(dataset(), backbone, ("standard",), rows_per_label=5, test_rows=6)
    assert row.subject == "fidelity/made"
    assert (row.d, row.classes, row.batch) == (16, 3, 6)
    assert 0 < row.max_error < 2**-10 + 2**-13
    assert "of 6 labels equal" in row.note
