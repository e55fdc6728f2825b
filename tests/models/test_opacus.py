"""Opacus, the usual library for this in torch, comes to the same: gradients, heads and epsilon."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer

from veilhead_models.dp_training import (
    BIAS_INPUT,
    CLIP_NORM,
    STEPS,
    ClippedSums,
    fit_private_head,
    step_size,
)
from veilhead_models.privacy import PrivacyBudget, Release, closed_form_epsilon

CLASSES, ROWS, DIMENSIONS = 5, 300, 12


def rows_with_centres() -> tuple[np.ndarray, np.ndarray]:
    """Embeddings in the unit ball, of many lengths, and their classes."""
    generator = np.random.default_rng(0)
    targets = generator.integers(0, CLASSES, ROWS).astype(np.intp)
    embeddings = 2 * generator.normal(size=(CLASSES, DIMENSIONS))[targets]
    embeddings += generator.normal(size=(ROWS, DIMENSIONS))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings * generator.uniform(0.1, 1, (ROWS, 1)), targets


class Theirs:
    """The same head in torch: gradients for each row, clipped and summed by Opacus."""

    def __init__(self, embeddings: np.ndarray, targets: np.ndarray, rate: float) -> None:
        inputs = np.column_stack([embeddings, np.full(len(embeddings), BIAS_INPUT)])
        # Its hooks want inputs with gradients.
        self.inputs, self.targets = torch.tensor(inputs, requires_grad=True), torch.tensor(targets)
        linear = torch.nn.Linear(inputs.shape[1], CLASSES, bias=False, dtype=torch.float64)
        torch.nn.init.zeros_(linear.weight)
        self.module = GradSampleModule(linear, loss_reduction="sum")
        self.optimizer = DPOptimizer(
            torch.optim.SGD(self.module.parameters(), lr=rate),
            noise_multiplier=0.0,
            max_grad_norm=CLIP_NORM,
            expected_batch_size=1,
            loss_reduction="sum",
        )
        (self.weight,) = self.module.parameters()

    def backward(self) -> None:
        """Gradients of all rows at the parameters of now."""
        self.optimizer.zero_grad()
        logits = self.module(self.inputs)
        torch.nn.functional.cross_entropy(logits, self.targets, reduction="sum").backward()


def test_sums_of_clipped_gradients_are_those_of_opacus() -> None:
    embeddings, targets = rows_with_centres()
    theirs = Theirs(embeddings, targets, rate=1.0)
    parameters = 3 * np.random.default_rng(1).normal(size=(CLASSES, DIMENSIONS + 1))
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(parameters))
    theirs.backward()
    norms = theirs.weight.grad_sample.flatten(1).norm(dim=1)
    assert ROWS / 10 < (norms > CLIP_NORM).sum() < 9 * ROWS / 10
    theirs.optimizer.clip_and_accumulate()
    ours = ClippedSums(embeddings, targets, CLASSES).at(parameters) / 2.0**36
    expected = theirs.weight.summed_grad.numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours, expected, atol=ROWS * 3e-5)


def test_without_noise_the_trained_head_is_that_of_opacus() -> None:
    embeddings, targets = rows_with_centres()
    budget = PrivacyBudget(4.0)
    fit = fit_private_head(
        embeddings,
        targets,
        CLASSES,
        budget,
        insecure_noise=lambda _, count: np.zeros(count, dtype=np.int64),
    )
    theirs = Theirs(embeddings, targets, rate=step_size(CLASSES, ROWS, budget.mu) / ROWS)
    for _ in range(STEPS):
        theirs.backward()
        theirs.optimizer.step()
    trained = theirs.weight.detach().numpy()
    assert np.abs(trained).max() > 0.5
    np.testing.assert_allclose(fit.weight, trained[:, :-1], atol=2e-3)
    np.testing.assert_allclose(fit.bias, trained[:, -1] * BIAS_INPUT, atol=2e-3)


@pytest.mark.filterwarnings(
    "ignore:Optimal order is the largest alpha:UserWarning",
    "ignore:divide by zero encountered in log:RuntimeWarning",  # of 1 - sampling rate, rightly
)
@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_its_accountants_come_to_the_epsilon_that_is_claimed(epsilon: float) -> None:
    budget = PrivacyBudget(epsilon)
    releases = (Release(math.sqrt(STEPS / 0.99) / budget.mu, STEPS), Release(10 / budget.mu))
    closed = closed_form_epsilon(releases, budget.delta)
    found = {}
    for kind in (PRVAccountant, RDPAccountant):
        accountant = kind()
        # Every step sees all rows: no sampling.
        accountant.history = [(one.noise_multiplier, 1.0, one.times) for one in releases]
        found[kind] = accountant.get_epsilon(budget.delta)
    # An upper bound, which allows for an error of 0.01.
    assert closed < found[PRVAccountant] < closed + 0.011
    # Renyi's bound is looser, and never below.
    assert closed < found[RDPAccountant] < 1.3 * closed
