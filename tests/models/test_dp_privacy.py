"""Accounts of a privacy budget, and what is refused."""

from __future__ import annotations

import math

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from veilhead_models.privacy import (
    PrivacyBudget,
    PrivacyStatement,
    Release,
    closed_form_epsilon,
    gaussian_delta,
    pld_epsilon,
)
from veilhead_protocol.errors import PrivacyError


@settings(max_examples=10, deadline=None)
@given(
    epsilon=st.floats(0.05, 8),
    delta=st.sampled_from([1e-3, 1e-5, 1e-7]),
    steps=st.integers(1, 200),
)
def test_two_accountants_agree_and_a_third_is_above_them(
    epsilon: float, delta: float, steps: int
) -> None:
    mu = PrivacyBudget(epsilon, delta).mu
    releases = (Release(math.sqrt(steps / 0.99) / mu, steps), Release(10 / mu))
    closed, distributions = closed_form_epsilon(releases, delta), pld_epsilon(releases, delta)
    assert closed == pytest.approx(epsilon, rel=1e-4)
    assert distributions == pytest.approx(closed, rel=1e-4)
    assert max(closed, distributions) <= epsilon
    renyi = RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    for release in releases:
        renyi.compose(SelfComposedDpEvent(GaussianDpEvent(release.noise_multiplier), release.times))
    assert closed < renyi.get_epsilon(delta) < 1.5 * closed


def test_closed_form_is_the_published_one() -> None:
    # The analytic Gaussian mechanism's deviation at epsilon 1, delta 1e-5 (Balle and Wang 2018).
    assert gaussian_delta(1 / 3.730632, 1.0) == pytest.approx(1e-5, rel=1e-5)
    # At epsilon 0, delta is the total variation distance of two normal distributions.
    assert gaussian_delta(2.0, 0.0) == pytest.approx(math.erf(1 / math.sqrt(2)))


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf, 20.5])
def test_an_epsilon_that_means_nothing_is_refused(epsilon: float) -> None:
    with pytest.raises(PrivacyError, match="got epsilon"):
        PrivacyBudget(epsilon)


def test_a_large_epsilon_needs_an_insecure_flag() -> None:
    assert PrivacyBudget(30, insecure_large_epsilon=True).mu > PrivacyBudget(20).mu


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_that_means_nothing_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="got delta"):
        PrivacyBudget(1.0, delta)


def test_a_delta_above_one_by_rows_is_refused() -> None:
    budget = PrivacyBudget(4.0, 1e-3)
    budget.check_rows(1000, 2)
    with pytest.raises(PrivacyError, match="above 1/1001"):
        budget.check_rows(1001, 2)


def test_too_few_rows_are_refused_by_what_the_budget_can_carry() -> None:
    PrivacyBudget(4.0).check_rows(240, 22)
    with pytest.raises(PrivacyError, match="expected at least 238"):
        PrivacyBudget(4.0).check_rows(237, 22)
    with pytest.raises(PrivacyError, match="expected at least 821 at epsilon 1"):
        PrivacyBudget(1.0).check_rows(240, 22)


def test_noise_that_does_not_fit_its_budget_is_refused() -> None:
    budget = PrivacyBudget(1.0)
    fitting = Release(1.01 / budget.mu)
    count = Release(1e6)
    PrivacyStatement.of_run(budget, steps=fitting, count=count, clip_norm=1.0)
    with pytest.raises(PrivacyError, match="does not fit its budget"):
        PrivacyStatement.of_run(budget, steps=Release(0.99 / budget.mu), count=count, clip_norm=1.0)
