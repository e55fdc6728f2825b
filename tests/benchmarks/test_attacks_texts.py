"""Inversion, attributes and adversarial text, on a made-up backbone: hashed words and letters."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

import numpy as np
import pytest

from veilhead_benchmarks.attacks import adversarial
from veilhead_benchmarks.attacks.attributes import ATTRIBUTES, infer, people
from veilhead_benchmarks.attacks.inversion import (
    bag_of_words,
    invert,
    word_auc,
    word_auc_deviation,
)

# fmt: off
SYMPTOMS = (
    "fever", "cough", "chest", "pain", "rash", "nausea", "fatigue", "swelling", "bleeding",
    "vertigo", "tremor", "migraine", "fracture", "burn", "wound", "infection", "allergy", "asthma",
    "anemia", "diabetes",
)
# fmt: on


def sentences(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    found = {" ".join(generator.sample(SYMPTOMS, 5)): None for _ in range(2 * count)}
    return list(found)[:count]


def embed(texts: Sequence[str], *, letters: int = 0) -> np.ndarray:
    """Sums of random directions, one a word, or one a run of letters: norm one."""
    rows = []
    for text in texts:
        found = text.lower().split()
        if letters:
            found = [text[place : place + letters] for place in range(len(text))]
        seeds = [zlib.crc32(piece.encode()) for piece in found] or [0]
        rows.append(sum(np.random.default_rng(seed).normal(size=128) for seed in seeds))
    return np.array([row / np.linalg.norm(row) for row in rows])


class TestInversion:
    def test_embeddings_give_the_text_away_and_queries_do_not(self) -> None:
        texts = sentences(360)
        results = {
            (result.target, result.metric.split(":")[0]): result
            for result in invert(texts, embed(texts), train_rows=240)
        }
        # Encryption is random: what is at chance misses 4 deviations once in some thousand times.
        assert [result for result in results.values() if result.holds is False] == []
        judged = {target for (target, _), result in results.items() if result.holds}
        wires = {"query bytes (standard)", "query bytes (TenSEAL mm)"}
        assert judged == {"embedding", "query before encryption"} | wires
        assert results["embedding", "decoder"].value > 0.95
        noises = [f"embedding, noise {ratio} of its size" for ratio in ("1", "4", "16")]
        falling = [results[target, "decoder"].value for target in ("embedding", *noises)]
        assert falling == sorted(falling, reverse=True)

    def test_areas_of_words(self) -> None:
        truths = np.random.default_rng(0).random((500, 8)) < 0.3
        assert word_auc(truths + 0.0, truths) == 1.0
        noise = np.random.default_rng(1).normal(size=truths.shape)
        deviation = word_auc_deviation(noise, truths)
        # One word's by Mann and Whitney's formula, for eight words that are independent.
        alone = np.sqrt(501 / (12 * truths.sum(axis=0) * (~truths).sum(axis=0))).mean()
        assert deviation == pytest.approx(alone / np.sqrt(8), rel=0.3)
        assert word_auc(noise, truths) == pytest.approx(0.5, abs=4 * deviation)

    def test_words_are_the_commonest(self) -> None:
        found, words = bag_of_words(["Fever and FEVER", "fever, cough", "rash"], 1)
        assert words == ("fever",)
        assert found.tolist() == [[True], [True], [False]]


def test_attributes_leave_with_what_is_replaced_and_stay_with_what_is_not() -> None:
    records = people(sentences(700), seed=1)
    wire = "query bytes (standard)"
    results = infer(records, lambda texts: embed(texts, letters=4), train_rows=500, wires=(wire,))
    assert len(results) == 4 * len(ATTRIBUTES)
    assert all(result.holds is not False for result in results)
    noised = {result.target for result in results if result.holds is None}
    assert noised == {"embedding, noise 4 of its size"}  # of which nothing is promised
    assert {result.system for result in results if result.target == wire} == {"veilhead"}


class TestAdversarialText:
    def test_a_typo_changes_little(self) -> None:
        generator = random.Random(0)
        for word in ("a", "of", "fever", "Infection"):
            for _ in range(50):
                assert abs(len(adversarial.typo(word, generator)) - len(word)) <= 1
        assert len(adversarial.with_typos("some words here", 9, generator).split()) == 3

    def test_edits_lower_the_margin_and_never_raise_it(self) -> None:
        texts = sentences(220)
        targets = np.array(["fever" in text or "cough" in text for text in texts], dtype=np.intp)
        results = adversarial.compare(
            (texts[:200], targets[:200]), (texts[200:], targets[200:]), 2, embed
        )
        values = [result.value for result in results if result.target == "head"]
        assert values == sorted(values, reverse=True)
        assert values[0] > 0.8
        assert values[-1] < 0.5
