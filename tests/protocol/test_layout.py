"""The layouts: products of packed polynomials have the logits where they are looked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from veilhead_protocol.errors import LayoutError, ScaleError
from veilhead_protocol.layout import (
    MAX_BLOCK_PRODUCTS,
    MAX_CLASSES,
    MAX_DIMENSIONS,
    MAX_LOGITS,
    MAX_PIECES,
    Layout,
    LayoutKind,
    group_limit,
    most_texts,
    plan,
)
from veilhead_protocol.parameters import COMPACT, PARAMETER_SETS, STRONG, ParameterSet

SETS = st.sampled_from(list(PARAMETER_SETS.values()))
DIMENSIONS = st.integers(1, MAX_DIMENSIONS)
CLASSES = st.integers(1, MAX_CLASSES)
EXPONENTS = st.integers(0, 12)
TEXTS = st.integers(1, 100) | st.integers(1, 4096)


def canonical(
    parameters: ParameterSet, texts: int, dimensions: int, classes: int, exponent: int
) -> Layout:
    return Layout.canonical(
        parameters,
        texts=texts,
        dimensions=dimensions,
        classes=classes,
        exponent=exponent,
        bulk=True,
    )


def existing(*counts: Any) -> Layout:
    """The layout of these counts, when there is one."""
    try:
        return canonical(*counts)
    except LayoutError:
        assume(False)
        raise


def negacyclic(first: Any, second: Any) -> list[int]:
    """The exact product modulo X^N + 1, by one multiplication of long integers."""
    degree, bits = len(first), 64

    def joined(row: Any) -> int:
        return int.from_bytes(np.asarray(row, dtype="<u8").tobytes(), "little")

    product = (joined(first) * joined(second)).to_bytes(2 * degree * bits // 8 + 8, "little")
    limbs = np.frombuffer(product, dtype="<u8").astype(np.int64)
    found: list[int] = (limbs[:degree] - limbs[degree : 2 * degree]).tolist()
    return found


def heads() -> st.SearchStrategy[tuple[ParameterSet, int, int, int, int]]:
    # Classes: enough for several groups, without many products.
    return st.tuples(SETS, TEXTS, DIMENSIONS, st.integers(1, 40), EXPONENTS)


@given(heads(), st.integers(0, 2**32))
@example((COMPACT, 1, 384, 22, 5), 0)
@example((COMPACT, 1, 384, 77, 5), 0)
@example((COMPACT, 1, 3000, 3, 2), 0)
@example((COMPACT, 1, 2048, 2, 0), 0)
@example((COMPACT, 1, 2049, 2, 0), 0)
@example((COMPACT, 1, 4096, 2, 12), 0)
@example((COMPACT, 1, 1, 40, 12), 0)
@example((STRONG, 1, 4096, 3, 9), 0)
@example((STRONG, 1, 10, 300, 12), 0)
@example((COMPACT, 3, 384, 77, 4), 0)
@example((COMPACT, 64, 384, 7, 4), 0)
@example((COMPACT, 31, 4096, 3, 4), 0)
@example((STRONG, 77, 768, 5, 3), 0)
@example((COMPACT, 2048, 5, 3, 4), 0)
@example((COMPACT, 1024, 7, 2, 4), 0)
@example((STRONG, 385, 100, 2, 0), 0)
def test_products_hold_the_logits(head: tuple[ParameterSet, int, int, int, int], seed: int) -> None:
    layout = existing(*head)
    _, texts, dimensions, classes, _ = head
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 1000, size=(classes, dimensions)).astype(np.float64)
    embeddings = rng.integers(0, 1000, size=(texts, dimensions)).astype(np.float64)
    queries = layout.pack_embeddings(embeddings)
    weights = layout.pack_weight(weight)
    used = layout.group * layout.block_length
    assert queries.shape == (layout.pieces, layout.degree)
    assert weights.shape == (layout.replies, layout.pieces, used)
    pieces = range(layout.pieces)
    checked = [0, layout.replies - 1] if layout.replies > 2 else range(layout.replies)
    for reply in checked:
        total = np.zeros(layout.degree, dtype=np.int64)
        for piece in pieces:
            row = np.zeros(layout.degree)
            row[:used] = weights[reply, piece]
            total += negacyclic(queries[piece], row)
        first = reply * layout.group
        expected = embeddings @ weight[first : first + layout.group].T  # text by text
        assert total[layout.wanted(reply)].tolist() == expected.reshape(-1).astype(int).tolist()


@given(SETS, TEXTS, DIMENSIONS, CLASSES, EXPONENTS)
def test_every_logit_has_one_place(
    parameters: ParameterSet, texts: int, dimensions: int, classes: int, exponent: int
) -> None:
    layout = existing(parameters, texts, dimensions, classes, exponent)
    sizes = {reply: len(layout.wanted(reply)) for reply in (0, layout.replies - 1)}
    last = sizes[layout.replies - 1]
    assert sizes[0] * (layout.replies - 1) + last == texts * classes
    assert 1 <= last <= sizes[0] <= texts * layout.group
    for reply in sizes:
        wanted = layout.wanted(reply)
        assert len(set(wanted.tolist())) == len(wanted)
        assert 0 <= wanted.min() <= wanted.max() < layout.degree
    numbers = np.arange(texts * classes, dtype=float).reshape(texts, classes)
    replies = [
        numbers[:, first : first + layout.group].reshape(-1)
        for first in range(0, classes, layout.group)
    ]
    assert np.array_equal(layout.logits(replies), numbers)


@given(SETS, TEXTS, DIMENSIONS, CLASSES, EXPONENTS)
def test_the_layout_is_the_cheapest_of_those_that_are_allowed(
    parameters: ParameterSet, texts: int, dimensions: int, classes: int, exponent: int
) -> None:
    layout = existing(parameters, texts, dimensions, classes, exponent)
    degree, limit = parameters.poly_modulus_degree, parameters.max_wanted(exponent)
    if texts > limit:
        assert layout.kind is LayoutKind.BULK
        assert layout.group == 1
    else:
        assert layout.kind is (LayoutKind.SINGLE if texts == 1 else LayoutKind.BLOCK)
        assert texts * layout.group <= limit
        assert layout.group <= group_limit(parameters, dimensions, exponent)
    assert texts * layout.group * layout.block_length <= degree
    assert layout.pieces == -(-dimensions // layout.block_length) <= MAX_PIECES
    assert layout.replies == -(-classes // layout.group)
    assert texts * classes <= MAX_LOGITS
    assert layout.kind is not LayoutKind.BLOCK or layout.products <= MAX_BLOCK_PRODUCTS
    if layout.kind is LayoutKind.BULK:
        return
    for group in range(1, min(limit // texts, group_limit(parameters, dimensions, exponent)) + 1):
        if texts * group > degree:
            continue
        pieces, replies = -(-dimensions // (degree // (texts * group))), -(-classes // group)
        if pieces > MAX_PIECES or (texts > 1 and pieces * replies > MAX_BLOCK_PRODUCTS):
            continue
        cost = 20 * pieces + 20 * replies + pieces * replies
        assert (layout.cost, layout.group) <= (cost, group)


@given(SETS, DIMENSIONS, EXPONENTS)
def test_groups_stay_within_the_hint_limit(
    parameters: ParameterSet, dimensions: int, exponent: int
) -> None:
    group = group_limit(parameters, dimensions, exponent)
    assert 1 <= group <= parameters.max_wanted(exponent)
    for texts in {1, most_texts(parameters, exponent, bulk=False)}:
        layout = canonical(parameters, texts, dimensions, 1, exponent)
        wanted = texts * layout.group
        if parameters is COMPACT:
            assert wanted * (exponent + 11) <= (1152 if exponent <= 7 else 920)
        else:
            assert wanted <= (192 if exponent <= 9 else 128)


def test_layouts_of_usual_heads() -> None:
    def shape(parameters: ParameterSet, texts: int, dimensions: int, classes: int) -> Any:
        layout = canonical(parameters, texts, dimensions, classes, 4)
        return layout.kind, layout.block_length, layout.pieces, layout.group, layout.replies

    single, block, bulk = LayoutKind.SINGLE, LayoutKind.BLOCK, LayoutKind.BULK
    assert shape(COMPACT, 1, 384, 2) == (single, 384, 1, 2, 1)
    assert shape(COMPACT, 1, 384, 20) == (single, 192, 2, 10, 2)
    assert shape(COMPACT, 1, 384, 77) == (single, 128, 3, 16, 5)
    assert shape(STRONG, 1, 384, 77) == (single, 192, 2, 16, 5)
    assert shape(COMPACT, 64, 384, 77) == (block, 32, 12, 1, 77)
    assert shape(COMPACT, 76, 384, 77) == (block, 26, 15, 1, 77)
    assert shape(COMPACT, 77, 384, 77) == (bulk, 26, 15, 1, 77)
    assert shape(COMPACT, 2048, 384, 77) == (bulk, 1, 384, 1, 77)


def test_small_embeddings_meet_the_limit() -> None:
    """The limit decides, not the space, as soon as d is small."""
    assert group_limit(COMPACT, 1, 7) == 1152 // 18
    assert group_limit(COMPACT, 1, 8) == 920 // 19
    assert group_limit(STRONG, 1, 9) == 192
    assert group_limit(STRONG, 1, 10) == 128
    # A large exponent leaves no room for the noise of groups that whole embeddings do not allow.
    assert group_limit(COMPACT, 384, 6) == 16
    assert group_limit(COMPACT, 384, 7) == 5
    assert group_limit(COMPACT, 3000, 7) == 1
    with pytest.raises(ScaleError):
        group_limit(COMPACT, 384, 13)


@pytest.mark.parametrize(
    "counts",
    [
        {"texts": 0},
        {"texts": -1},
        {"texts": 2049, "bulk": True},
        {"texts": 73},
        {"texts": 2048, "bulk": True, "classes": 513},
        {"texts": 2048, "bulk": True, "dimensions": 1025},
        {"texts": 64, "classes": 400},
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
    assert Layout.canonical(COMPACT, **(good | {"texts": 72}))
    with pytest.raises(LayoutError):
        Layout.canonical(COMPACT, **(good | counts))


def test_unused_coefficients_are_zero() -> None:
    layout = canonical(COMPACT, 2, 100, 7, 1)
    stride = layout.group * layout.block_length
    query = layout.pack_embeddings(np.ones((2, 100)))
    assert query.sum() == 200
    assert not query[:, stride + layout.block_length :].any()
    assert not query[:, layout.block_length : stride].any()
    weights = layout.pack_weight(np.ones((7, 100)))
    assert weights.sum() == 700


# --- plans ----------------------------------------------------------------------------------------


def cost_of(requests: list[int], *head: Any) -> int:
    return sum(
        canonical(head[0], texts, *head[1:]).cost + (100 if texts > 1 else 0) for texts in requests
    )


@given(
    SETS,
    st.integers(0, 3000),
    st.sampled_from([1, 64, 384, 768, 4096]),
    st.sampled_from([1, 2, 8, 77, 1000, 4096]),
    st.integers(0, 8),
    st.booleans(),
)
def test_plans_send_every_text_once_and_never_cost_more_than_single_queries(
    parameters: ParameterSet, texts: int, dimensions: int, classes: int, exponent: int, bulk: bool
) -> None:
    head = (dimensions, classes, exponent)
    requests = plan(
        parameters,
        texts=texts,
        dimensions=dimensions,
        classes=classes,
        exponent=exponent,
        bulk=bulk,
    )
    assert sum(requests) == texts
    assert all(size >= 1 for size in requests)
    assert cost_of(requests, parameters, *head) <= cost_of([1] * texts, parameters, *head)
    for size in requests:
        layout = canonical(parameters, size, *head)
        if layout.kind is LayoutKind.BULK:
            assert bulk
            assert size > dimensions  # where the charge is one for each text


def test_plans_of_a_usual_head() -> None:
    def planned(texts: int, *, bulk: bool = False) -> list[int]:
        return plan(COMPACT, texts=texts, dimensions=384, classes=77, exponent=4, bulk=bulk)

    assert planned(0) == []
    assert planned(1) == [1]
    assert planned(3) == [3]
    assert planned(64) == [64]
    assert sum(planned(3000)[:39]) == 39 * 76
    assert planned(3000, bulk=True) == [2048, 952]
    assert planned(384, bulk=True) == planned(384)
