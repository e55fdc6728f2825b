"""Scales: the published numbers, what they promise, and which heads are refused."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from veilhead_protocol.errors import ScaleError
from veilhead_protocol.parameters import COMPACT, PARAMETER_SETS, STANDARD, ParameterSet
from veilhead_protocol.scales import (
    BOUND_STEP,
    LOGIT_STEP,
    MAX_EXPONENT,
    HeadScales,
    plan_scales,
    project,
    quantise,
    round_logits,
    served_weight,
)

SETS = st.sampled_from(list(PARAMETER_SETS.values()))
both_sets = pytest.mark.parametrize("parameters", PARAMETER_SETS.values(), ids=lambda p: p.name)


def head(
    classes: int, dimensions: int, norm: float, *, bias: float = 0.5, seed: int = 0
) -> tuple[Any, Any]:
    """Weight [C, d] with rows of this norm, and a bias [C]."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(classes, dimensions))
    weight *= norm / np.linalg.norm(weight, axis=1, keepdims=True)
    return weight, rng.uniform(-bias, bias, size=classes)


HEADS = st.builds(
    head,
    st.integers(1, 300),
    st.integers(1, 800),
    st.floats(-7, 25).map(lambda bits: 2.0**bits),
    bias=st.floats(0, 10),
    seed=st.integers(0, 2**32),
)


def flood_ratio_bits(
    weight: Any, bias: Any, parameters: ParameterSet, downscale_bits: int, group: int
) -> float:
    """R of a head served divided by 2^k with groups of so many; none where a logit is too large."""
    return _served(weight / 2.0**downscale_bits, bias / 2.0**downscale_bits, parameters, group)[
        "flood_ratio_bits"
    ]


def _served(weight: Any, bias: Any, parameters: ParameterSet, group: int) -> dict[str, float]:
    """The formulas of docs/protocol.md once more, written differently."""
    degree, prime = parameters.poly_modulus_degree, parameters.prime
    largest = float(max(np.linalg.norm(weight, axis=1) + np.abs(bias)))
    if largest > 65:
        return {"flood_ratio_bits": -math.inf}
    bits = next(
        bits
        for bits in range(8, 31)
        if np.sqrt(((weight - np.rint(weight * 2**bits) / 2**bits) ** 2).sum(axis=1)).max()
        <= 3.7e-4
    )
    quantised = np.rint(weight * 2**bits) / 2**bits
    residue = float(np.sqrt(((weight - quantised) ** 2).sum(axis=1)).max())
    largest = float(max(np.linalg.norm(quantised, axis=1) + np.abs(bias)))
    exponent = next(e for e in range(64) if largest + 2**-8 <= 2**e)
    if exponent > 6:
        return {"flood_ratio_bits": -math.inf}
    log_delta = (52 if parameters is STANDARD else 49) - exponent
    delta, flood, kappa = 2.0**log_delta, 2.0 ** (log_delta - 11), exponent + 21
    s_squared = max((quantised[at : at + group] ** 2).sum() for at in range(len(weight)))
    noise = 8 * math.sqrt(10.6 * 4.0**bits * s_squared + 10.5 * (4 * degree / 3 + 1))
    cut = 8 * math.sqrt((2 * degree / 3 + 1) / 12) * prime / 2.0**kappa
    return {
        "exponent": exponent,
        "scale_bits": log_delta,
        "weight_scale_bits": bits,
        "flood_bits": log_delta - 11,
        "reply_bits": kappa,
        "flood_ratio_bits": math.log2(flood / noise),
        "error": residue + 2.0**-11 + noise / delta + cut / delta + 2.0**-13,
    }


def expected_scales(weight: Any, bias: Any, parameters: ParameterSet) -> dict[str, float] | None:
    """What a head must be given; None where it must be refused."""
    for k in range(25):
        if flood_ratio_bits(weight, bias, parameters, k, 1) < 6:
            continue
        served = _served(weight / 2.0**k, bias / 2.0**k, parameters, 1)
        exponent = int(served["exponent"])
        if exponent + k > 24:
            return None
        group, most = 1, (2900 if parameters is STANDARD else 1152) // (exponent + 11)
        while 2 * group <= most and flood_ratio_bits(weight, bias, parameters, k, 2 * group) >= 6:
            group *= 2
        served = _served(weight / 2.0**k, bias / 2.0**k, parameters, group)
        return served | {
            "exponent": exponent + k,
            "downscale_bits": k,
            "group_limit": group,
            "error": served["error"] * 2.0**k,
        }
    return None


@given(SETS, HEADS)
def test_the_formulas(parameters: ParameterSet, made: tuple[Any, Any]) -> None:
    weight, bias = made
    expected = expected_scales(weight, bias, parameters)
    if expected is None:
        with pytest.raises(ScaleError, match="divide weight and bias"):
            plan_scales(weight, bias, parameters)
        return
    scales = plan_scales(weight, bias, parameters)
    for field in (
        "exponent",
        "downscale_bits",
        "scale_bits",
        "weight_scale_bits",
        "flood_bits",
        "reply_bits",
        "group_limit",
    ):
        assert getattr(scales, field) == expected[field], field
    assert scales.query_scale_bits == scales.scale_bits - scales.weight_scale_bits
    # Rounded up to the grid, by less than a step.
    step = BOUND_STEP * 2**scales.downscale_bits
    assert scales.error_bound % step == 0
    assert 0 <= scales.error_bound - expected["error"] + 1e-8 * step < step * (1 + 2e-8)


@both_sets
@pytest.mark.parametrize("dimensions", [384, 768])
@pytest.mark.parametrize("classes", [2, 22, 150])
def test_typical_heads(parameters: ParameterSet, dimensions: int, classes: int) -> None:
    for norm in (3.0, 8.0, 20.0):
        weight, bias = head(classes, dimensions, norm)
        scales = plan_scales(weight, bias, parameters)
        assert scales.downscale_bits == 0
        assert scales.error_bound <= 2**-10 + 2**-13
        assert scales.weight_scale_bits == (14 if dimensions == 384 else 15)
        assert 23 <= scales.reply_bits <= 26
        if parameters is STANDARD:  # the flood never limits a group before the hints do
            most = parameters.max_wanted(scales.served_exponent)
            assert scales.group_limit == 2 ** (most.bit_length() - 1)


def test_the_exponent_covers_the_largest_logit() -> None:
    for largest, exponent in ((0.9, 0), (0.997, 1), (1.9, 1), (1.999, 2), (3.9, 2), (100, 7)):
        weight = np.zeros((2, 8))
        weight[0, 0] = largest
        assert plan_scales(weight, np.zeros(2), STANDARD).exponent == exponent
        # A bias counts as much as a weight.
        found = plan_scales(np.zeros((2, 8)), np.array([0, -largest]), STANDARD)
        assert found.exponent == exponent


@given(SETS, st.floats(0.1, 30), st.floats(1, 4))
def test_larger_weights_never_need_a_smaller_exponent(
    parameters: ParameterSet, norm: float, factor: float
) -> None:
    weight, bias = head(4, 384, norm)
    smaller = plan_scales(weight, bias, parameters)
    larger = plan_scales(weight * factor, bias * factor, parameters)
    assert larger.exponent >= smaller.exponent
    assert larger.downscale_bits >= smaller.downscale_bits


# --- heads of large logits ------------------------------------------------------------------------


def one_logit(largest: float) -> Any:
    """Weight [1, d] of one row of this norm."""
    return head(1, 384, largest, bias=0.0)[0]


@both_sets
@pytest.mark.parametrize("exponent", range(5, MAX_EXPONENT + 1))
def test_heads_are_divided_by_the_least_power_that_serves(
    parameters: ParameterSet, exponent: int
) -> None:
    """Two bits of R more with each step, so never far above e - 6."""
    weight, bias = one_logit(0.9 * 2.0**exponent), np.zeros(1)
    scales = plan_scales(weight, bias, parameters)
    least = max(0, exponent - 6)
    assert scales.exponent == exponent
    assert least <= scales.downscale_bits <= least + 1
    assert flood_ratio_bits(weight, bias, parameters, scales.downscale_bits, 1) >= 6
    if scales.downscale_bits:
        assert flood_ratio_bits(weight, bias, parameters, scales.downscale_bits - 1, 1) < 6


def test_the_flood_may_ask_for_more() -> None:
    """Where groups of one do not keep R at 6 bits, though the logits would fit."""
    weight, bias = head(64, 3200, 60.0, bias=0.0)
    assert flood_ratio_bits(weight, bias, COMPACT, 0, 1) < 6
    scales = plan_scales(weight, bias, COMPACT)
    assert (scales.exponent, scales.downscale_bits) == (6, 1)
    assert scales.group_limit == 4  # what is there to spare of R is used for groups
    assert plan_scales(weight, bias, STANDARD).downscale_bits == 0
    added = flood_ratio_bits(weight, bias, COMPACT, 1, 1)
    assert added - flood_ratio_bits(weight, bias, COMPACT, 0, 1) == pytest.approx(2, abs=0.01)


@both_sets
@pytest.mark.parametrize("larger", [1, 4, 10, 18])
def test_error_and_step_grow_with_the_division(parameters: ParameterSet, larger: int) -> None:
    """A head times 2^m is served as the same numbers, and all that is in logits times 2^m."""
    weight, bias = head(3, 384, 50.0)
    scales = plan_scales(weight, bias, parameters)
    assert (scales.exponent, scales.downscale_bits) == (6, 0)
    found = plan_scales(weight * 2.0**larger, bias * 2.0**larger, parameters)
    assert (found.exponent, found.downscale_bits) == (6 + larger, larger)
    assert found.error_bound == scales.error_bound * 2.0**larger
    assert found.logit_step == scales.logit_step * 2.0**larger == 2.0 ** (larger - 12)
    for field in (
        "scale_bits",
        "weight_scale_bits",
        "flood_bits",
        "reply_bits",
        "group_limit",
        "query_scale_bits",
        "served_exponent",
    ):
        assert getattr(found, field) == getattr(scales, field), field
    assert np.array_equal(served_weight(weight * 2.0**larger, found), served_weight(weight, scales))


@both_sets
def test_heads_beyond_the_largest_exponent_are_refused(parameters: ParameterSet) -> None:
    weight = np.zeros((2, 8))
    weight[0, 0] = 2.0**MAX_EXPONENT * 0.99
    assert plan_scales(weight, np.zeros(2), parameters).exponent == MAX_EXPONENT == 24
    for larger in (2.0**MAX_EXPONENT + 1, 2.0**60, 1e300):
        weight[0, 0] = larger
        with pytest.raises(ScaleError, match="divide weight and bias"):
            plan_scales(weight, np.zeros(2), parameters)
        with pytest.raises(ScaleError, match="divide weight and bias"):
            plan_scales(np.zeros((2, 8)), weight[:, 0], parameters)
    with pytest.raises(ScaleError):
        plan_scales(np.full((1, 4096), 1e9 / 3), np.zeros(1), parameters)


# --- groups ---------------------------------------------------------------------------------------


@both_sets
def test_groups_are_the_largest_that_keep_the_flood_six_bits_above(
    parameters: ParameterSet,
) -> None:
    limited = 0
    for norm in (0.5, 7.0, 28.0, 60.0, 900.0):
        for dimensions in (384, 3200):
            weight, bias = head(300, dimensions, norm)
            scales = plan_scales(weight, bias, parameters)
            limit, k = scales.group_limit, scales.downscale_bits
            most = parameters.max_wanted(scales.served_exponent)
            assert limit & (limit - 1) == 0
            assert 1 <= limit <= most
            assert flood_ratio_bits(weight, bias, parameters, k, limit) >= 6
            if 2 * limit <= most:
                limited += 1
                assert flood_ratio_bits(weight, bias, parameters, k, 2 * limit) < 6
    assert limited > 0 or parameters is STANDARD


def test_the_largest_run_of_rows_decides() -> None:
    """Large rows that lie together are met in one polynomial; apart, they are not."""
    together, apart = np.full((64, 1600), 1e-4), np.full((64, 1600), 1e-4)
    row = head(1, 1600, 55.0)[0][0]
    together[20:28] = row
    apart[::8] = row
    bias = np.zeros(64)
    assert plan_scales(together, bias, COMPACT).group_limit < (
        plan_scales(apart, bias, COMPACT).group_limit
    )


def test_the_flood_limit_is_exactly_six_bits() -> None:
    """Between two norms, one with a group of two and one without, the ratio passes 6."""
    low, high = 45.0, 60.0
    for _ in range(40):
        middle = (low + high) / 2
        weight, bias = head(5, 1600, middle, bias=0.0)
        if plan_scales(weight, bias, COMPACT).group_limit < 2:
            high = middle
        else:
            low = middle
    for norm, group in ((low, 2), (high, 1)):
        weight, bias = head(5, 1600, norm, bias=0.0)
        scales = plan_scales(weight, bias, COMPACT)
        assert (scales.group_limit, scales.downscale_bits) == (group, 0)
        ratio = flood_ratio_bits(weight, bias, COMPACT, 0, 2)
        assert (ratio >= 6) is (group == 2)
        assert ratio == pytest.approx(6, abs=1e-6)


@both_sets
@pytest.mark.parametrize("exponent", range(MAX_EXPONENT + 1))
def test_no_answer_wraps_around(parameters: ParameterSet, exponent: int) -> None:
    """The largest logit, the flood and the error together stay below half the prime."""
    weight = np.zeros((1, 8))
    weight[0, 0] = 2.0**exponent * (1 - 2.0**-12)
    scales = plan_scales(weight, np.zeros(1), parameters)
    reach = (weight[0, 0] + scales.error_bound) / 2.0**scales.downscale_bits
    assert reach * 2.0**scales.scale_bits < parameters.prime / 2


def test_small_weights_round_away_without_harm() -> None:
    weight = np.full((1, 4096), 2.0**-31)
    weight[0, 0] = 2000.0
    assert plan_scales(weight, np.zeros(1), STANDARD).weight_scale_bits <= 30


@both_sets
def test_zero_heads_have_scales(parameters: ParameterSet) -> None:
    scales = plan_scales(np.zeros((3, 16)), np.zeros(3), parameters)
    assert (scales.exponent, scales.weight_scale_bits, scales.reply_bits) == (0, 8, 21)


@given(SETS, st.integers(0, 6), st.integers(0, 18), st.integers(8, 30))
def test_public_numbers_follow_from_the_exponent(
    parameters: ParameterSet, served: int, downscale_bits: int, weight_bits: int
) -> None:
    scales = HeadScales.of_exponent(
        parameters,
        served + downscale_bits,
        downscale_bits=downscale_bits,
        weight_scale_bits=weight_bits,
        group_limit=1,
        error_bound=2**-10,
    )
    top = 52 if parameters is STANDARD else 49
    assert scales.served_exponent == served
    assert scales.scale_bits == top - served
    assert scales.flood_bits == top - served - 11
    assert scales.reply_bits == served + 21
    assert scales.query_scale_bits == top - served - weight_bits


# --- quantising, projecting, rounding ------------------------------------------------------------

FLOATS = st.floats(-1e6, 1e6, allow_nan=False)
MATRICES = npst.arrays(
    np.float64, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=FLOATS
)


@given(MATRICES, st.integers(8, 30))
def test_quantised_weights(weight: Any, bits: int) -> None:
    quantised = quantise(weight, bits)
    assert np.abs(quantised - weight).max() <= 2.0**-bits / 2
    assert np.array_equal(quantised * 2.0**bits, np.rint(quantised * 2.0**bits))
    assert np.array_equal(quantise(quantised, bits), quantised)


@given(MATRICES, st.floats(1e-3, 1e3))
def test_projection(embeddings: Any, scale: float) -> None:
    projected = project(embeddings, scale)
    norms = np.linalg.norm(projected, axis=1)
    assert norms.max() <= 1 + 1e-12
    counted = np.abs(embeddings) >= 2.0**-99 * np.abs(embeddings).max(axis=1, keepdims=True)
    counted &= np.abs(embeddings) >= 2.0**-499  # what is smaller is as good as nothing
    counts = np.where(counted, embeddings, 0) / scale
    for row, scaled, norm, keep in zip(projected, counts, norms, counted, strict=True):
        length = np.linalg.norm(scaled)
        if length <= 1:
            assert np.array_equal(row[keep], scaled[keep])  # untouched, to the last bit
        else:
            assert abs(norm - 1) < 1e-12
            assert np.allclose(row * length, scaled, rtol=1e-12, atol=1e-20)
        assert np.abs(row[~keep]).max(initial=0) <= 2.0**-98 * np.abs(row).max() + 1e-149
    again = project(projected, 1.0)
    assert np.allclose(again, projected, rtol=1e-15, atol=1e-29)


ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True)
#: What a vendor, by its backbone and its scale, may make of a row.
EXTREMES = st.sampled_from(
    [
        0.0,
        -0.0,
        5e-324,
        -2.2e-308,
        1e-200,
        1e-154,
        1.0,
        1e154,
        -1.7976931348623157e308,
        np.inf,
        np.nan,
    ]
)


@given(
    npst.arrays(
        np.float64, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=ANY_FLOAT | EXTREMES
    ),
    st.floats(1e-9, 1e9) | st.sampled_from([1e-9, 1e9]),
)
def test_every_finite_row_has_a_projection_and_nothing_is_raised(
    embeddings: Any, scale: float
) -> None:
    with np.errstate(all="raise"):
        projected = project(embeddings, scale)
    finite = np.isfinite(embeddings).all(axis=1)
    assert np.isnan(projected[~finite]).all()
    found = projected[finite]
    assert (np.abs(found[found != 0]) >= 2.0**-700).all()  # and no number is subnormal
    for row, got in zip(embeddings[finite], found, strict=True):
        exact = [Fraction(value) / Fraction(scale) for value in row.tolist()]
        length = math.sqrt(min(sum(value * value for value in exact), Fraction(4)))
        if length < 2:
            expected = [float(value) / max(1.0, length) for value in exact]
            assert np.allclose(got, expected, rtol=1e-12, atol=1e-28)
        else:
            largest = max(map(abs, exact))
            direction = np.array([float(value / largest) for value in exact])
            assert np.allclose(got, direction / np.linalg.norm(direction), rtol=1e-12, atol=1e-28)


def test_projection_works_in_double_precision() -> None:
    """A float32 row of norm one, a hair longer in float64, is shortened and not refused."""
    rows = np.random.default_rng(0).normal(size=(200, 384)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert (np.linalg.norm(rows.astype(np.float64), axis=1) > 1).any()
    projected = project(rows, 1.0)
    assert projected.dtype == np.float64
    assert np.linalg.norm(projected, axis=1).max() <= 1 + 1e-15


def divided(downscale_bits: int) -> HeadScales:
    return HeadScales.of_exponent(
        STANDARD,
        6 + downscale_bits,
        downscale_bits=downscale_bits,
        weight_scale_bits=14,
        group_limit=1,
        error_bound=1.0,
    )


@given(npst.arrays(np.float64, st.integers(1, 40), elements=FLOATS), st.integers(0, 18))
def test_rounded_logits(served: Any, downscale_bits: int) -> None:
    scales = divided(downscale_bits)
    rounded = round_logits(served, scales)
    steps = rounded / scales.logit_step
    assert np.array_equal(steps, np.rint(steps))
    multiplied = served * 2.0**downscale_bits
    assert np.abs(rounded - multiplied).max() <= scales.logit_step / 2 * (1 + 2**-10)
    assert np.array_equal(round_logits(rounded / 2.0**downscale_bits, scales), rounded)


def test_the_logit_step_is_published() -> None:
    assert LOGIT_STEP == 2**-12
    served = np.array([1 / 8192, 3 / 8192, 0.3])
    assert round_logits(served, divided(0)).tolist() == [0, 2 / 4096, 1229 / 4096]
    assert round_logits(served, divided(10)).tolist() == [0, 1 / 2, 1229 / 4]


@pytest.mark.parametrize("downscale_bits", [0, 4, 10, 18])
def test_logits_are_rounded_before_they_are_multiplied(downscale_bits: int) -> None:
    """All 255 units of a reply within a step give one logit: the other order would tell them."""
    units = np.arange(-127, 128)
    served = 0.25 + units * 2.0**-20
    assert set(round_logits(served, divided(downscale_bits))) == {0.25 * 2.0**downscale_bits}
    swapped = np.rint(served * 2.0**downscale_bits / LOGIT_STEP) * LOGIT_STEP
    assert len(set(swapped)) == {0: 1, 4: 17, 10: 255, 18: 255}[downscale_bits]
