"""The layout: products of packed polynomials have the logits where they are looked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from veilhead_protocol.errors import LayoutError, ScaleError
from veilhead_protocol.layout import MAX_CLASSES, MAX_DIMENSIONS, Layout, LayoutKind, group_size
from veilhead_protocol.parameters import COMPACT, PARAMETER_SETS, STRONG, ParameterSet

SETS = st.sampled_from(list(PARAMETER_SETS.values()))
DIMENSIONS = st.integers(1, MAX_DIMENSIONS)
EXPONENTS = st.integers(0, 12)


def canonical(parameters: ParameterSet, dimensions: int, classes: int, exponent: int) -> Layout:
    return Layout.canonical(
        parameters, texts=1, dimensions=dimensions, classes=classes, exponent=exponent
    )


def negacyclic(first: Any, second: Any) -> list[int]:
    """The exact product modulo X^N + 1, by one multiplication of long integers."""
    degree, bits = len(first), 64
    joined = [
        sum(int(value) << (bits * i) for i, value in enumerate(row) if value)
        for row in (first, second)
    ]
    product = joined[0] * joined[1]
    mask = (1 << bits) - 1
    limbs = [product >> (bits * i) & mask for i in range(2 * degree)]
    return [limbs[i] - limbs[i + degree] for i in range(degree)]


def heads() -> st.SearchStrategy[tuple[ParameterSet, int, int, int]]:
    # Classes: enough for several groups, without many products.
    return st.tuples(SETS, DIMENSIONS, st.integers(1, 40), EXPONENTS)


@given(heads(), st.integers(0, 2**32))
@example((COMPACT, 384, 22, 5), 0)
@example((COMPACT, 3000, 3, 2), 0)
@example((COMPACT, 2048, 2, 0), 0)
@example((COMPACT, 2049, 2, 0), 0)
@example((COMPACT, 4096, 2, 12), 0)
@example((COMPACT, 1, 40, 12), 0)
@example((STRONG, 4096, 3, 9), 0)
@example((STRONG, 10, 300, 12), 0)
def test_products_hold_the_logits(head: tuple[ParameterSet, int, int, int], seed: int) -> None:
    parameters, dimensions, classes, exponent = head
    layout = canonical(parameters, dimensions, classes, exponent)
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 1000, size=(classes, dimensions)).astype(np.float64)
    embedding = rng.integers(0, 1000, size=dimensions).astype(np.float64)
    queries = layout.pack_embedding(embedding)
    weights = layout.pack_weight(weight)
    assert queries.shape == (layout.pieces, layout.degree)
    assert weights.shape == (layout.replies, layout.pieces, layout.degree)
    checked = [0, layout.replies - 1] if layout.replies > 3 else range(layout.replies)
    for reply in checked:
        total = np.zeros(layout.degree, dtype=object)
        for query, row in zip(queries, weights[reply], strict=True):
            total += np.array(negacyclic(query, row), dtype=object)
        found = [int(total[at]) for at in layout.wanted(reply)]
        first = reply * layout.group
        expected = weight[first : first + layout.group] @ embedding
        assert found == expected.astype(int).tolist()


@given(SETS, DIMENSIONS, st.integers(1, MAX_CLASSES), EXPONENTS)
def test_every_class_has_one_place(
    parameters: ParameterSet, dimensions: int, classes: int, exponent: int
) -> None:
    layout = canonical(parameters, dimensions, classes, exponent)
    sizes = [len(layout.wanted(reply)) for reply in range(layout.replies)]
    assert sum(sizes) == classes
    assert min(sizes) >= 1
    assert max(sizes) <= layout.group
    for reply in (0, layout.replies - 1):
        wanted = layout.wanted(reply)
        assert len(set(wanted.tolist())) == len(wanted)
        assert wanted.min() >= 0
        assert wanted.max() < layout.degree
        # What decrypts every reply is made from the first: it must begin with the others.
        assert layout.wanted(0)[: len(wanted)].tolist() == wanted.tolist()


@given(SETS, DIMENSIONS, EXPONENTS)
def test_groups_stay_within_the_hint_limit(
    parameters: ParameterSet, dimensions: int, exponent: int
) -> None:
    group = group_size(parameters, dimensions, exponent)
    assert 1 <= group <= parameters.max_wanted(exponent)
    assert group * min(dimensions, parameters.poly_modulus_degree) <= parameters.poly_modulus_degree
    hint_bits = group * (exponent + 11)
    if parameters is COMPACT:
        assert hint_bits <= (1152 if exponent <= 7 else 920)
    else:
        assert group <= (192 if exponent <= 9 else 128)


def test_small_embeddings_meet_the_limit() -> None:
    """The limit decides, not the space, as soon as d is small."""
    assert group_size(COMPACT, 1, 7) == 1152 // 18
    assert group_size(COMPACT, 1, 8) == 920 // 19
    assert group_size(STRONG, 1, 9) == 192
    assert group_size(STRONG, 1, 10) == 128
    assert group_size(COMPACT, 384, 5) == 5
    assert group_size(COMPACT, 3000, 5) == 1
    with pytest.raises(ScaleError):
        group_size(COMPACT, 384, 13)


@given(SETS, DIMENSIONS, st.integers(1, MAX_CLASSES), EXPONENTS)
def test_the_layout_is_a_function_of_the_counts(
    parameters: ParameterSet, dimensions: int, classes: int, exponent: int
) -> None:
    layout = canonical(parameters, dimensions, classes, exponent)
    assert layout == canonical(parameters, dimensions, classes, exponent)
    assert layout.kind is LayoutKind.SINGLE
    assert layout.pieces == -(-dimensions // parameters.poly_modulus_degree)
    assert layout.block_length == min(dimensions, parameters.poly_modulus_degree)
    assert layout.replies == -(-classes // layout.group)


@pytest.mark.parametrize(
    "counts",
    [
        {"texts": 0},
        {"texts": 2},
        {"dimensions": 0},
        {"dimensions": MAX_DIMENSIONS + 1},
        {"classes": 0},
        {"classes": MAX_CLASSES + 1},
        {"dimensions": -1},
    ],
)
def test_other_counts_have_no_layout(counts: dict[str, int]) -> None:
    good = {"texts": 1, "dimensions": 384, "classes": 22, "exponent": 5}
    assert Layout.canonical(COMPACT, **good)
    with pytest.raises(LayoutError):
        Layout.canonical(COMPACT, **(good | counts))


def test_unused_coefficients_are_zero() -> None:
    layout = canonical(COMPACT, 384, 7, 1)
    query = layout.pack_embedding(np.ones(384))
    assert query.sum() == 384
    assert not query[0, 384:].any()
    weights = layout.pack_weight(np.ones((7, 384)))
    assert weights[0].sum() == 5 * 384
    assert weights[1].sum() == 2 * 384
    assert not weights[1, 0, 2 * 384 :].any()
