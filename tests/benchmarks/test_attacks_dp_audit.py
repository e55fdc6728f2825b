"""The one-run audit: its bound is valid, an honest run passes, and an impostor is caught."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from veilhead_benchmarks.attacks.dp_audit import (
    CONFIDENCE,
    Canaries,
    audit_claims,
    epsilon_bound,
)


def unit_rows(rows: int, dimensions: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(rows, dimensions))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings, generator.integers(0, classes, rows).astype(np.intp)


class TestBound:
    def test_all_guesses_right_gives_what_coins_would_give_one_time_in_twenty(self) -> None:
        bias = 0.05 ** (1 / 200)
        expected = math.log(bias / (1 - bias))
        assert epsilon_bound(200, 200, 200, 0.0) == pytest.approx(expected, abs=1e-6)

    def test_half_of_the_guesses_right_says_nothing(self) -> None:
        assert epsilon_bound(1000, 400, 200, 1e-5) == 0.0
        assert epsilon_bound(1000, 400, 0, 1e-5) == 0.0

    @pytest.mark.parametrize("epsilon", [0.5, 2.0])
    def test_randomised_response_is_accused_falsely_at_most_one_time_in_twenty(
        self, epsilon: float
    ) -> None:
        guesses, bias = 60, 1 / (1 + math.exp(-epsilon))
        accused = sum(
            binom.pmf(right, guesses, bias)
            for right in range(guesses + 1)
            if epsilon_bound(guesses, guesses, right, 0.0) > epsilon
        )
        assert 0.005 < accused <= 1 - CONFIDENCE

    def test_more_right_guesses_raise_it_and_delta_lowers_it(self) -> None:
        bounds = [epsilon_bound(500, 200, right, 1e-5) for right in range(100, 201, 20)]
        assert bounds == sorted(bounds)
        assert epsilon_bound(500, 200, 190, 1e-3) < epsilon_bound(500, 200, 190, 0.0)


def test_canaries_of_one_class_are_orthogonal() -> None:
    made = Canaries.made(60, 16, 4, seed=1)
    for target in range(4):
        mine = made.embeddings[made.targets == target]
        np.testing.assert_allclose(mine @ mine.T, np.eye(len(mine)), atol=1e-12)
    with pytest.raises(ValueError, match="expected 1 to 64"):
        Canaries.made(65, 16, 4, seed=1)


def test_an_honest_run_passes_and_one_without_noise_is_caught() -> None:
    honest, silent = audit_claims(*unit_rows(300, 96, 4), 4, canaries=320, epsilons=(1.0,))
    assert honest.value <= 1.0
    assert honest.holds
    assert silent.value > 2.5
    assert silent.holds
