"""Label noise and membership: attacks that must succeed without privacy, and not with it."""

from __future__ import annotations

import numpy as np
import pytest

from veilhead_benchmarks.attacks.label_noise import compare
from veilhead_benchmarks.attacks.membership import (
    attack_heads,
    attack_training,
    confidences,
    private_training,
)
from veilhead_models.training import fit_head


def unit_rows(rows: int, dimensions: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(rows, dimensions))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings, generator.integers(0, classes, rows).astype(np.intp)


def test_noise_of_epsilon_by_rows_on_the_labels_hides_nobody() -> None:
    recipe, ours = compare(*unit_rows(300, 24, 3), 3, epsilon=1.0, trials=30)
    assert recipe.value == 1.0  # every neighbour told apart, at a claimed epsilon of 1
    assert recipe.holds
    assert ours.value < 0.95
    assert ours.holds


class TestMembership:
    def test_confidence_is_the_log_odds_of_the_own_class(self) -> None:
        embeddings, targets = unit_rows(20, 5, 3)
        weight, bias = np.random.default_rng(1).normal(size=(3, 5)), np.array([0.1, -0.3, 0.0])
        exponentials = np.exp(embeddings @ weight.T + bias)
        own = (exponentials / exponentials.sum(axis=1, keepdims=True))[np.arange(20), targets]
        np.testing.assert_allclose(
            confidences(embeddings, targets, weight, bias), np.log(own / (1 - own))
        )

    @pytest.mark.parametrize(("shift", "auc", "rate"), [(0.0, 0.5, 0.001), (6.0, 1.0, 0.9)])
    def test_ratios_tell_apart_what_can_be_told_apart(
        self, shift: float, auc: float, rate: float
    ) -> None:
        generator = np.random.default_rng(2)
        inside = generator.random((30, 400)) < 0.5
        answers = generator.normal(size=(30, 400)) + shift * inside
        found = attack_heads(answers, inside)
        assert found.auc == pytest.approx(auc, abs=0.02)
        assert found.true_positives == pytest.approx(rate, abs=0.1 if shift else 0.002)

    def test_members_of_a_small_head_are_visible_and_privacy_hides_them(self) -> None:
        embeddings, targets = unit_rows(160, 64, 2)

        def plainly(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return fit_head(x, y, 2)

        auc, rate = attack_training(
            plainly, "plain", embeddings, targets,
            rows=80, heads=20, classes=2, private=False, visible=True,
        )  # fmt: skip
        assert auc.value > 0.8
        assert rate.holds
        hidden, hidden_rate = attack_training(
            private_training(2, 1.0, seed=1), "private", embeddings, targets,
            rows=80, heads=20, classes=2, private=True, visible=False,
        )  # fmt: skip
        assert hidden.value < auc.value - 0.15
        assert hidden_rate.holds
