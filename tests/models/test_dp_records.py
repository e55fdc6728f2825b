"""Private training on tokens: what a record adds, whatever it holds, and what is claimed for it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veilhead_models.dp_records import (
    MAX_TOKENS,
    OUTSIDE_WEIGHT,
    RECORD_CLIP_NORM,
    ClippedRecords,
    fit_private_tagger,
)
from veilhead_models.dp_training import BIAS_INPUT, GRID, STEPS
from veilhead_models.privacy import PrivacyBudget, Release, closed_form_epsilon
from veilhead_protocol.errors import DatasetError, PrivacyError


def records_of(
    classes: int, records: int, dimensions: int, seed: int = 0, *, tokens: int = 12
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Records of up to so many tokens; a token's class says around which centre it lies."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(size=(classes, dimensions))
    made = []
    for count in generator.integers(1, tokens + 1, records):
        targets = generator.integers(0, classes, count).astype(np.intp)
        embeddings = centres[targets] + 0.7 * generator.normal(size=(count, dimensions))
        made.append((embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), targets))
    return made


def squared_norm(sums: np.ndarray) -> int:
    """In whole numbers: no rounding hides anything."""
    return sum(int(value) ** 2 for value in sums.ravel())


class TestSums:
    def test_they_are_the_clipped_gradients_of_torch(self) -> None:
        records = records_of(5, 40, 12)
        records = [(x * (0.1 if i % 3 else 1), y) for i, (x, y) in enumerate(records)]
        parameters = np.random.default_rng(2).normal(size=(5, 13))

        def loss(weights: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            weight = torch.tensor([OUTSIDE_WEIGHT, 1, 1, 1, 1], dtype=torch.float64)
            return torch.nn.functional.cross_entropy(rows @ weights.T, targets, weight)  # a mean

        expected = torch.zeros(5, 13, dtype=torch.float64)
        clipped = 0
        for embeddings, targets in records:
            inputs = np.concatenate([embeddings, np.full((len(targets), 1), BIAS_INPUT)], axis=1)
            gradient = torch.func.grad(loss)(
                torch.tensor(parameters), torch.tensor(inputs), torch.tensor(targets)
            )
            norm = float(gradient.norm())
            clipped += norm > RECORD_CLIP_NORM
            factor = min(1.0, RECORD_CLIP_NORM / norm)
            expected += gradient * factor
            # Record by record: the norm is found exactly, and a small gradient stays as it is.
            alone = ClippedRecords([(embeddings, targets)], 5).at(parameters) / GRID
            np.testing.assert_allclose(alone, gradient.numpy() * factor, atol=4e-5)
        assert 0 < clipped < 40
        sums = ClippedRecords(records, 5).at(parameters)
        np.testing.assert_allclose(sums / GRID, expected.numpy(), atol=40 * 4e-5)

    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 2**32 - 1),
        records=st.integers(1, 12),
        tokens=st.sampled_from([1, 7, 400]),
        spread=st.sampled_from([0.0, 1.0, 1e3, 1e300, math.nan]),
        length=st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
        alike=st.booleans(),
    )
    def test_no_record_changes_them_by_more_than_the_clip_norm(
        self, seed: int, records: int, tokens: int, spread: float, length: float, alike: bool
    ) -> None:
        generator = np.random.default_rng(seed)
        made = records_of(4, records, 6, seed, tokens=tokens)
        embeddings, targets = made[-1]
        if alike:  # all tokens pull into one direction: the worst that a record can do
            embeddings, targets = np.tile(embeddings[:1], (tokens, 1)), np.tile(targets[:1], tokens)
        made[-1] = embeddings * length, targets
        parameters = spread * generator.normal(size=(4, 7))
        whole = ClippedRecords(made, 4).at(parameters)
        alone = ClippedRecords(made[-1:], 4).at(parameters)
        assert squared_norm(alone) <= int(RECORD_CLIP_NORM * GRID) ** 2
        without = ClippedRecords(made[:-1], 4).at(parameters) if made[:-1] else 0 * alone
        assert (whole - without == alone).all()

    def test_the_clip_norm_is_reached(self) -> None:
        """Or the noise would be too large for what it hides."""
        embeddings = np.eye(6)[:1]
        sums = ClippedRecords([(embeddings, np.array([2], dtype=np.intp))], 4)
        norm = math.sqrt(squared_norm(sums.at(np.zeros((4, 7))))) / GRID
        assert norm == pytest.approx(RECORD_CLIP_NORM, rel=1e-5)

    def test_neither_order_nor_number_of_tokens_shows_not_even_in_the_last_bit(self) -> None:
        records = records_of(5, 30, 24, tokens=60)
        generator = np.random.default_rng(3)
        parameters = generator.normal(size=(5, 25))
        one = ClippedRecords(records, 5).at(parameters)
        mixed = []
        for place in generator.permutation(30):
            embeddings, targets = records[place]
            order = generator.permutation(len(targets))
            mixed.append((embeddings[order], targets[order]))
        assert (ClippedRecords(mixed, 5).at(parameters) == one).all()
        doubled = [(np.concatenate([x, x]), np.concatenate([y, y])) for x, y in records]
        assert (ClippedRecords(doubled, 5).at(parameters) == one).all()

    def test_a_record_without_tokens_adds_nothing_and_counts(self) -> None:
        records = records_of(3, 5, 8)
        empty = np.zeros((0, 8)), np.zeros(0, dtype=np.intp)
        parameters = np.ones((3, 9))
        one, other = ClippedRecords(records, 3), ClippedRecords([*records, empty], 3)
        assert (one.at(parameters) == other.at(parameters)).all()
        assert other.count == one.count + 1


class TestFit:
    @pytest.mark.parametrize("epsilon", [1.0, 4.0])
    def test_the_noise_that_is_drawn_is_worth_the_epsilon_that_is_claimed(
        self, epsilon: float
    ) -> None:
        drawn: list[tuple[float, int]] = []

        def listen(scale: float, count: int) -> np.ndarray:
            drawn.append((scale, count))
            return np.zeros(count, dtype=np.int64)

        fit = fit_private_tagger(
            records_of(3, 200, 8), 3, PrivacyBudget(epsilon), insecure_noise=listen
        )
        (count_scale, one), *steps = drawn
        assert one == 1
        assert [count for _, count in steps] == [3 * 9] * STEPS
        releases = [Release(count_scale / GRID)]  # one record changes the count by one
        releases += [Release(scale / (RECORD_CLIP_NORM * GRID)) for scale, _ in steps]
        assert closed_form_epsilon(tuple(releases), 1e-5) == pytest.approx(epsilon, rel=1e-4)
        statement = fit.statement
        assert statement.epsilon == epsilon
        first, second = statement.accountants.values()
        assert first == pytest.approx(second, rel=1e-4)
        assert epsilon * 0.999 < max(first, second) <= epsilon
        assert statement.unit == "one record (all of its tokens) of the training split"
        assert statement.clip_norm == RECORD_CLIP_NORM
        assert "number of records" in statement.mechanism
        assert any("several records of one person" in what for what in statement.not_covered)
        assert "row" not in " ".join(statement.not_covered)

    def test_the_step_follows_the_noised_number_of_records_not_of_tokens(self) -> None:
        records = records_of(3, 900, 8)  # so many that noise does not limit the step
        doubled = [(np.concatenate([x, x]), np.concatenate([y, y])) for x, y in records]

        def fit(found: list[tuple[np.ndarray, np.ndarray]], more: int) -> np.ndarray:
            calls = iter(range(STEPS + 1))

            def noise(scale: float, count: int) -> np.ndarray:
                return np.full(count, more * int(GRID) if next(calls) == 0 else 0, dtype=np.int64)

            return fit_private_tagger(found, 3, PrivacyBudget(12.0), insecure_noise=noise).weight

        assert (fit(records, 0) == fit(doubled, 0)).all()
        assert not np.allclose(fit(records, 0), fit(records, 50), atol=1e-6)

    def test_a_private_head_learns_and_two_runs_give_two(self) -> None:
        records = records_of(3, 900, 16)
        one, other = (fit_private_tagger(records[:700], 3, PrivacyBudget(4.0)) for _ in range(2))
        right = [(x @ one.weight.T + one.bias).argmax(axis=1) == y for x, y in records[700:]]
        assert np.concatenate(right).mean() > 0.85
        assert (one.weight != other.weight).all()

    def test_what_cannot_be_trained_on_is_refused(self) -> None:
        budget = PrivacyBudget(4.0)
        with pytest.raises(DatasetError, match="no records"):
            fit_private_tagger([], 3, budget)
        records = records_of(3, 4, 8)
        records[2][0][0, 1] = np.nan
        with pytest.raises(DatasetError, match=r"record 3: .* NaN or infinity"):
            fit_private_tagger(records, 3, budget)
        long = np.zeros((MAX_TOKENS + 1, 2)), np.zeros(MAX_TOKENS + 1, dtype=np.intp)
        with pytest.raises(DatasetError, match="record 1 has 8193 tokens"):
            fit_private_tagger([long], 3, budget)
        with pytest.raises(PrivacyError, match="got epsilon"):
            PrivacyBudget(-1.0)
