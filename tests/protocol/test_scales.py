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
from veilhead_protocol.layout import group_limit
from veilhead_protocol.parameters import COMPACT, PARAMETER_SETS, STRONG, ParameterSet
from veilhead_protocol.scales import (
    BOUND_STEP,
    LOGIT_STEP,
    HeadScales,
    plan_scales,
    project,
    quantise,
    round_logits,
)

SETS = st.sampled_from(list(PARAMETER_SETS.values()))


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
    st.integers(1, 40),
    st.integers(1, 800),
    st.floats(0.01, 60),
    bias=st.floats(0, 10),
    seed=st.integers(0, 2**32),
)


def expected_scales(weight: Any, bias: Any, parameters: ParameterSet) -> dict[str, float]:
    """The formulas of docs/protocol.md once more, written differently."""
    degree, modulus = parameters.poly_modulus_degree, parameters.data_modulus
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
    log_delta = (52 if parameters is COMPACT else 70) - exponent
    delta, flood, kappa = 2.0**log_delta, 2.0 ** (log_delta - 11), exponent + 21
    group = group_limit(parameters, weight.shape[1], exponent)
    s_squared = max((quantised[at : at + group] ** 2).sum() for at in range(len(weight)))
    v_key = (
        10.5 * (4 * degree / 3 + 1)
        if parameters.special_prime is None
        else (2 * degree / 3 + 1) / 12
    )
    noise = 8 * math.sqrt(10.6 * 4.0**bits * s_squared + v_key)
    cut = 8 * math.sqrt((2 * degree / 3 + 1) / 12) * modulus / 2.0**kappa
    return {
        "exponent": exponent,
        "scale_bits": log_delta,
        "weight_scale_bits": bits,
        "flood_bits": log_delta - 11,
        "reply_bits": kappa,
        "flood_ratio_bits": math.log2(flood / noise),
        "largest": largest,
        "error": residue + 2.0**-11 + noise / delta + cut / delta + 2.0**-13,
    }


@given(SETS, HEADS)
def test_the_formulas(parameters: ParameterSet, made: tuple[Any, Any]) -> None:
    weight, bias = made
    expected = expected_scales(weight, bias, parameters)
    if expected["flood_ratio_bits"] < 6:
        with pytest.raises(ScaleError, match="strong"):
            plan_scales(weight, bias, parameters)
        return
    scales = plan_scales(weight, bias, parameters)
    for field in ("exponent", "scale_bits", "weight_scale_bits", "flood_bits", "reply_bits"):
        assert getattr(scales, field) == expected[field], field
    assert scales.query_scale_bits == scales.scale_bits - scales.weight_scale_bits
    # Rounded up to the grid, by less than a step.
    assert scales.error_bound % BOUND_STEP == 0
    assert 0 <= scales.error_bound - expected["error"] + 1e-12 < BOUND_STEP + 2e-12


@pytest.mark.parametrize("parameters", [COMPACT, STRONG], ids=lambda p: p.name)
@pytest.mark.parametrize("dimensions", [384, 768])
@pytest.mark.parametrize("classes", [2, 22, 150])
def test_typical_heads(parameters: ParameterSet, dimensions: int, classes: int) -> None:
    for norm in (3.0, 8.0, 20.0):
        weight, bias = head(classes, dimensions, norm)
        scales = plan_scales(weight, bias, parameters)
        assert scales.error_bound <= 2**-10 + 2**-13
        assert scales.weight_scale_bits == (14 if dimensions == 384 else 15)
        assert 23 <= scales.reply_bits <= 26
        ratio = expected_scales(weight, bias, parameters)["flood_ratio_bits"]
        assert ratio > (7 if parameters is COMPACT else 25)


def test_the_exponent_covers_the_largest_logit() -> None:
    for largest, exponent in ((0.9, 0), (0.997, 1), (1.9, 1), (1.999, 2), (3.9, 2), (100, 7)):
        weight = np.zeros((2, 8))
        weight[0, 0] = largest
        assert plan_scales(weight, np.zeros(2), STRONG).exponent == exponent
        # A bias counts as much as a weight.
        assert plan_scales(np.zeros((2, 8)), np.array([0, -largest]), STRONG).exponent == exponent


@given(SETS, st.floats(0.1, 30), st.floats(1, 4))
def test_larger_weights_never_need_a_smaller_exponent(
    parameters: ParameterSet, norm: float, factor: float
) -> None:
    weight, bias = head(4, 384, norm)
    smaller = plan_scales(weight, bias, parameters)
    larger = plan_scales(weight * factor, bias * factor, parameters)
    assert larger.exponent >= smaller.exponent
    assert larger.scale_bits <= smaller.scale_bits
    assert larger.reply_bits >= smaller.reply_bits


@pytest.mark.parametrize("parameters", [COMPACT, STRONG], ids=lambda p: p.name)
def test_heads_beyond_the_largest_exponent_are_refused(parameters: ParameterSet) -> None:
    weight = np.zeros((2, 8))
    weight[0, 0] = 4097.0
    with pytest.raises(ScaleError, match="divide weight and bias"):
        plan_scales(weight, np.zeros(2), parameters)
    with pytest.raises(ScaleError, match="divide weight and bias"):
        plan_scales(weight * 2**30, np.zeros(2), parameters)


def test_compact_refuses_before_strong_does() -> None:
    """In `compact` the flood stops covering the noise long before e = 12."""
    weight, bias = head(5, 384, 400.0)
    with pytest.raises(ScaleError, match="parameters='strong'"):
        plan_scales(weight, bias, COMPACT)
    assert plan_scales(weight, bias, STRONG).exponent == 9
    # At the very top, strong still serves.
    weight, bias = head(5, 384, 4000.0)
    assert plan_scales(weight, bias, STRONG).exponent == 12


def test_the_flood_limit_is_exactly_six_bits() -> None:
    """Between two norms, one accepted and one refused, the ratio passes 6."""
    low, high = 10.0, 400.0
    for _ in range(40):
        middle = (low + high) / 2
        weight, bias = head(5, 384, middle, bias=0.0)
        try:
            plan_scales(weight, bias, COMPACT)
        except ScaleError:
            high = middle
        else:
            low = middle
    below = expected_scales(*head(5, 384, low, bias=0.0), COMPACT)["flood_ratio_bits"]
    above = expected_scales(*head(5, 384, high, bias=0.0), COMPACT)["flood_ratio_bits"]
    assert above < 6 <= below


@pytest.mark.parametrize("parameters", [COMPACT, STRONG], ids=lambda p: p.name)
@pytest.mark.parametrize("exponent", range(13))
def test_no_accepted_answer_wraps_around(parameters: ParameterSet, exponent: int) -> None:
    """The largest logit, the flood and the error together stay below half the modulus."""
    weight = np.zeros((1, 8))
    weight[0, 0] = 2.0**exponent - 2.0**-7
    try:
        scales = plan_scales(weight, np.zeros(1), parameters)
    except ScaleError as error:
        refusal = str(error)
    else:
        assert scales.exponent == exponent
        reach = (weight[0, 0] + scales.error_bound) * 2.0**scales.scale_bits
        assert reach < parameters.data_modulus / 2
        return
    if parameters is COMPACT:
        assert exponent >= 7
        assert "the flood covers" in refusal or "less than half the modulus" in refusal
    else:
        # Q is a hair below 2^71: only the very largest logit does not fit.
        assert exponent == 12
        assert "less than half the modulus" in refusal


def test_weights_that_cannot_be_quantised_are_refused() -> None:
    weight = np.full((1, 4096), 2.0**-31)
    weight[0, 0] = 2000.0
    # In reach: small weights round away without harm.
    assert plan_scales(weight, np.zeros(1), STRONG).weight_scale_bits <= 30
    with pytest.raises(ScaleError):
        plan_scales(np.full((1, 4096), 1e9 / 3), np.zeros(1), STRONG)


def test_zero_heads_have_scales() -> None:
    for parameters in PARAMETER_SETS.values():
        scales = plan_scales(np.zeros((3, 16)), np.zeros(3), parameters)
        assert (scales.exponent, scales.weight_scale_bits, scales.reply_bits) == (0, 8, 21)


@given(SETS, st.integers(0, 12), st.integers(8, 30))
def test_public_numbers_follow_from_the_exponent(
    parameters: ParameterSet, exponent: int, weight_bits: int
) -> None:
    scales = HeadScales.of_exponent(parameters, exponent, weight_bits, 2**-10)
    top = 52 if parameters is COMPACT else 70
    assert scales.scale_bits == top - exponent
    assert scales.flood_bits == top - exponent - 11
    assert scales.reply_bits == exponent + 21
    assert scales.query_scale_bits == top - exponent - weight_bits


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


@given(npst.arrays(np.float64, st.integers(1, 40), elements=FLOATS))
def test_rounded_logits(logits: Any) -> None:
    rounded = round_logits(logits)
    assert np.array_equal(rounded * 4096, np.rint(rounded * 4096))
    assert np.abs(rounded - logits).max() <= LOGIT_STEP / 2 + 1e-9
    assert np.array_equal(round_logits(rounded), rounded)


def test_the_logit_step_is_published() -> None:
    assert LOGIT_STEP == 2**-12
    assert round_logits(np.array([1 / 8192, 3 / 8192, 0.3])).tolist() == [0, 2 / 4096, 1229 / 4096]
