"""Label noise and membership: attacks that must succeed without privacy, and not with it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from veilhead_benchmarks.attacks.label_noise import compare
from veilhead_benchmarks.attacks.membership import (
    FALSE_POSITIVES,
    JUDGED_MEMBERS,
    Membership,
    attack_heads,
    attack_training,
    confidences,
    largest_rate,
    private_training,
)
from veilhead_models.privacy import PrivacyBudget
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

    @pytest.mark.parametrize(
        ("true_rate", "least", "most"), [(0.001, 0.95, 0.999), (0.003, 0.01, 0.1)]
    )
    def test_the_interval_holds_chance_where_there_is_nothing_and_notices_three_times_that(
        self, true_rate: float, least: float, most: float
    ) -> None:
        generator = np.random.default_rng(3)
        shift = norm.ppf(true_rate) - norm.ppf(FALSE_POSITIVES)
        held = 0
        for _ in range(200):
            members, others = generator.normal(size=(2, JUDGED_MEMBERS))
            low, high = Membership.of_ratios(members + shift, others).interval
            held += low <= FALSE_POSITIVES <= high
        assert least < held / 200 < most

    def test_the_interval_is_about_the_rate_and_knows_no_more_than_few_answers_tell(self) -> None:
        found = Membership(auc=0.6, found=60, members=20_000, mistaken=20, others=20_000)
        low, high = found.interval
        assert FALSE_POSITIVES < low < found.true_positives < high
        assert Membership(0.5, 0, 200, 0, 200).interval == (0.0, 1.0)
        doubled = Membership(auc=0.6, found=120, members=40_000, mistaken=20, others=20_000)
        assert doubled.interval[0] == pytest.approx(low, rel=0.1)  # shares, not numbers

    def test_only_as_many_heads_are_judged_as_are_asked_for(self) -> None:
        generator = np.random.default_rng(4)
        inside = generator.random((20, 300)) < 0.5
        answers = generator.normal(size=(20, 300))
        answers[:2] += 6.0 * inside[:2]  # the first two betray everybody
        answers[2:] -= 6.0 * inside[2:]  # the others say the opposite, and teach the attacker that
        assert attack_heads(answers, inside, 2).auc < 0.2
        assert attack_heads(answers, inside, 2).members == int(inside[:2].sum())
        assert attack_heads(answers, inside).auc > 0.8

    def test_members_of_a_small_head_are_visible_and_privacy_hides_them(self) -> None:
        embeddings, targets = unit_rows(160, 64, 2)

        def plainly(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return fit_head(x, y, 2)

        auc, rate = attack_training(
            plainly, "plain", embeddings, targets,
            rows=80, heads=20, classes=2, budget=None, visible=True,
        )  # fmt: skip
        assert auc.value > 0.8
        assert rate.holds
        budget = PrivacyBudget(1.0)
        hidden, hidden_rate = attack_training(
            private_training(2, budget, seed=1), "private", embeddings, targets,
            rows=80, heads=20, classes=2, budget=budget, visible=False,
        )  # fmt: skip
        assert hidden.value < auc.value - 0.15
        assert "95 % interval" in hidden_rate.expected
        assert hidden_rate.holds

    @pytest.mark.parametrize(
        ("epsilon", "expected"), [(1.0, "0.001 within"), (1.5, "at most 0.003")]
    )
    def test_usual_training_breaks_the_promise_of_any_epsilon_that_it_claims(
        self, epsilon: float, expected: str
    ) -> None:
        embeddings, targets = unit_rows(160, 64, 2)

        def impostor(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return fit_head(x, y, 2)

        _, rate = attack_training(
            impostor, "impostor", embeddings, targets,
            rows=80, heads=80, classes=2, budget=PrivacyBudget(epsilon), visible=False,
        )  # fmt: skip
        assert expected in rate.expected
        assert rate.holds is False

    def test_no_attack_on_a_gaussian_mechanism_finds_more_than_the_guarantee_says(self) -> None:
        assert largest_rate(0.0) == pytest.approx(FALSE_POSITIVES)
        mu = PrivacyBudget(4.0).mu
        generator = np.random.default_rng(6)
        others, members = generator.normal(size=(2, 10**6))  # the best attack there is
        found = Membership.of_ratios(members + mu, others).true_positives
        assert found == pytest.approx(largest_rate(mu), rel=0.06)
        assert largest_rate(mu) == pytest.approx(0.0151, abs=0.0002)
