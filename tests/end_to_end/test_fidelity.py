"""Real heads on real medical phrases: encrypted logits against plaintext ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.heads import Pair

from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import Backbone, minilm
from veilhead_models.datasets import Split, load_dataset
from veilhead_models.training import train_head

ROWS = 200


@pytest.fixture(scope="module")
def backbone():
    directory, section = minilm()
    return Backbone.load(directory, section, device="cpu")


def some(split, rows, seed):
    """So many rows of a split, by a fixed seed."""
    order = np.random.default_rng(seed).permutation(len(split.texts))[:rows]
    return Split(texts=tuple(split.texts[row] for row in order), targets=split.targets[order])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "classes", "rows"),
    [
        ("icd10-chapters", 22, 1500),
        ("icd10-sections-77", 77, 1500),
        ("icd10-sections-150", 150, 2500),
    ],
)
def test_logits_are_within_the_bound_and_labels_agree(backbone, name, classes, rows):
    dataset = load_dataset(name)
    assert len(dataset.labels) == classes
    # A part of the data, to save time; the head is a real one all the same.
    part = replace(dataset, train=some(dataset.train, rows, 1), test=some(dataset.test, ROWS, 2))
    head = train_head(part, backbone)
    embeddings = backbone.embed(part.test.texts)
    for parameters in ("standard", "compact"):
        pair = Pair.of(
            HeadArtifact.from_weights(
                head.weight, head.bias, dataset.labels, name=name, parameters=parameters
            )
        )
        bound = pair.artifact.manifest.head.error_bound
        assert bound <= 2**-10 + 2**-13
        plain = pair.artifact.logits(embeddings)
        for row, expected in zip(embeddings, plain, strict=True):
            query = pair.session.encrypt(row)
            logits = pair.session.decrypt(query, pair.answer(query))
            assert np.abs(logits - expected).max() <= bound
            first, second = np.sort(expected)[[-1, -2]]
            if first - second > 2 * bound:
                assert logits.argmax() == expected.argmax()
