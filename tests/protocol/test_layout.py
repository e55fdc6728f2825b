"""The layouts: products of packed polynomials have the logits where they are looked for."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from veilhead_protocol.errors import LayoutError
from veilhead_protocol.layout import (
    MAX_BLOCK_PRODUCTS,
    MAX_CLASSES,
    MAX_DIMENSIONS,
    MAX_LOGITS,
    MAX_PIECES,
    HeadShape,
    Layout,
    LayoutKind,
    block_sizes,
    plan,
)
from veilhead_protocol.parameters import COMPACT, PARAMETER_SETS, STANDARD

#: Of one block for each head: what a service encodes for it, and nothing else, is bounded.
MOST_BLOCK_SIZES = 10


def shapes(classes: st.SearchStrategy[int], bulk: st.SearchStrategy[bool]) -> Any:
    return st.builds(
        HeadShape,
        st.sampled_from(list(PARAMETER_SETS.values())),
        st.integers(1, MAX_DIMENSIONS) | st.sampled_from([64, 384, 768]),
        classes,
        st.integers(0, 6),
        st.integers(0, 8).map(lambda bits: 1 << bits),
        bulk,
    )


SHAPES = shapes(st.integers(1, MAX_CLASSES) | st.integers(1, 100), st.booleans())


def usual(parameters: Any, dimensions: int, classes: int, **changed: Any) -> HeadShape:
    return HeadShape(
        parameters,
        dimensions,
        classes,
        exponent=changed.get("exponent", 4),
        group_limit=changed.get("group_limit", 64 if parameters is COMPACT else 128),
        bulk=changed.get("bulk", False),
    )


def requests(shape: HeadShape) -> list[int]:
    """Every number of texts that a request may have, of bulk some."""
    sizes = [1, *block_sizes(shape)]
    if shape.bulk:
        sizes += [shape.max_wanted + 1, 500, 2048, shape.parameters.poly_modulus_degree]
    return sizes


REQUESTS = SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), st.sampled_from(requests(shape))))


def existing(shape: HeadShape, texts: int) -> Layout:
    """The layout of so many texts, when there is one."""
    try:
        return Layout.canonical(shape, texts)
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


# Classes: enough for several groups, without many products.
SMALL = shapes(st.integers(1, 40), st.booleans()).flatmap(
    lambda shape: st.tuples(st.just(shape), st.sampled_from(requests(shape)))
)


@given(SMALL, st.integers(0, 2**32))
@example((usual(COMPACT, 384, 22, exponent=5), 1), 0)
@example((usual(COMPACT, 384, 77, exponent=5), 1), 0)
@example((usual(COMPACT, 3000, 3), 1), 0)
@example((usual(COMPACT, 2048, 2), 1), 0)
@example((usual(COMPACT, 2049, 2), 1), 0)
@example((usual(COMPACT, 4096, 2, group_limit=1), 1), 0)
@example((usual(COMPACT, 1, 40), 1), 0)
@example((usual(STANDARD, 4096, 3), 1), 0)
@example((usual(STANDARD, 10, 300), 1), 0)
@example((usual(STANDARD, 384, 300, exponent=0, group_limit=256), 1), 0)
@example((usual(COMPACT, 384, 77), 4), 0)
@example((usual(COMPACT, 384, 7), 64), 0)
@example((usual(COMPACT, 4096, 3), 32), 0)
@example((usual(STANDARD, 768, 5), 64), 0)
@example((usual(COMPACT, 5, 3, bulk=True), 2048), 0)
@example((usual(COMPACT, 7, 2, bulk=True), 1024), 0)
@example((usual(STANDARD, 100, 2, bulk=True), 385), 0)
def test_products_hold_the_logits(head: tuple[HeadShape, int], seed: int) -> None:
    shape, texts = head
    layout = existing(shape, texts)
    dimensions, classes = shape.dimensions, shape.classes
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


@given(REQUESTS)
def test_every_logit_has_one_place(head: tuple[HeadShape, int]) -> None:
    shape, texts = head
    layout, classes = existing(shape, texts), shape.classes
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


@given(REQUESTS)
def test_the_layout_is_the_cheapest_of_those_that_are_allowed(head: tuple[HeadShape, int]) -> None:
    shape, texts = head
    layout = existing(shape, texts)
    degree, limit = shape.parameters.poly_modulus_degree, shape.max_wanted
    if texts > limit:
        assert layout.kind is LayoutKind.BULK
        assert layout.group == 1
    else:
        assert layout.kind is (LayoutKind.SINGLE if texts == 1 else LayoutKind.BLOCK)
        assert texts * layout.group <= limit
        assert layout.group <= shape.group_limit
    assert texts * layout.group * layout.block_length <= degree
    assert layout.pieces == -(-shape.dimensions // layout.block_length) <= MAX_PIECES
    assert layout.replies == -(-shape.classes // layout.group)
    assert texts * shape.classes <= MAX_LOGITS
    if layout.kind is LayoutKind.BULK:
        return
    for group in range(1, min(limit // texts, shape.group_limit) + 1):
        if texts * group > degree:
            continue
        pieces = -(-shape.dimensions // (degree // (texts * group)))
        replies = -(-shape.classes // group)
        if pieces > MAX_PIECES:
            continue
        cost = 20 * pieces + 20 * replies + pieces * replies
        assert (layout.cost, layout.group) <= (cost, group)


@given(REQUESTS)
def test_groups_stay_within_the_hint_limit(head: tuple[HeadShape, int]) -> None:
    """Of no reply polynomial but those of bulk are more coefficients sent than the hints allow."""
    shape, texts = head
    layout = existing(shape, texts)
    if layout.kind is not LayoutKind.BULK:
        hints = 2900 if shape.parameters is STANDARD else 1152
        assert len(layout.wanted(0)) * (shape.exponent + 11) <= hints
        assert layout.group <= shape.group_limit


def test_layouts_of_usual_heads() -> None:
    def of(shape: HeadShape, texts: int) -> Any:
        layout = Layout.canonical(shape, texts)
        return layout.kind, layout.block_length, layout.pieces, layout.group, layout.replies

    single, block, bulk = LayoutKind.SINGLE, LayoutKind.BLOCK, LayoutKind.BULK
    assert of(usual(COMPACT, 384, 2), 1) == (single, 384, 1, 2, 1)
    assert of(usual(COMPACT, 384, 20), 1) == (single, 192, 2, 10, 2)
    assert of(usual(COMPACT, 384, 77), 1) == (single, 128, 3, 16, 5)
    assert of(usual(STANDARD, 384, 2), 1) == (single, 384, 1, 2, 1)
    assert of(usual(STANDARD, 384, 77), 1) == (single, 192, 2, 20, 4)
    assert of(usual(COMPACT, 384, 77), 64) == (block, 32, 12, 1, 77)
    seventy_seven = usual(COMPACT, 384, 77, bulk=True)
    assert of(seventy_seven, 77) == (bulk, 26, 15, 1, 77)
    assert of(seventy_seven, 2048) == (bulk, 1, 384, 1, 77)
    # Large heads have large groups, as far as hints and noise let them.
    assert of(usual(STANDARD, 384, 4096), 1) == (single, 32, 12, 128, 32)
    assert of(usual(STANDARD, 384, 4096, group_limit=16), 1)[3] == 16


def test_a_group_has_as_many_classes_as_its_limit_says() -> None:
    for limit in (1, 2, 16, 128):
        layout = Layout.canonical(usual(STANDARD, 8, 1000, group_limit=limit), 1)
        assert layout.group <= limit
        assert layout.group > limit // 2
    # and never more than the hints allow
    assert Layout.canonical(usual(COMPACT, 1, 1000, group_limit=256), 1).group <= 1152 // 15


@pytest.mark.parametrize(
    ("texts", "changed"),
    [
        (0, {}),
        (-1, {}),
        (3, {}),
        (75, {}),
        (77, {}),
        (2049, {"bulk": True}),
        (2048, {"bulk": True, "classes": 513}),
        (2048, {"bulk": True, "dimensions": 1025}),
        (64, {"classes": 4096}),
        (1, {"dimensions": 0}),
        (1, {"dimensions": MAX_DIMENSIONS + 1}),
        (1, {"classes": 0}),
        (1, {"classes": MAX_CLASSES + 1}),
        (1, {"dimensions": -1}),
    ],
)
def test_other_counts_have_no_layout(texts: int, changed: dict[str, Any]) -> None:
    good = usual(COMPACT, 384, 22)
    for size in (1, 64, *block_sizes(good)):
        assert Layout.canonical(good, size).texts == size
    assert Layout.canonical(replace(good, bulk=True), 77).kind is LayoutKind.BULK
    with pytest.raises(LayoutError):
        Layout.canonical(replace(good, **changed), texts)


# --- block sizes ----------------------------------------------------------------------------------


def products(shape: HeadShape, texts: int) -> int:
    return Layout.canonical(shape, texts).products


@given(SHAPES)
@example(usual(STANDARD, 4096, 4096, group_limit=1))
@example(usual(STANDARD, 1, 1, exponent=0, group_limit=256))
@example(usual(COMPACT, 4096, 2048, group_limit=1))
@example(usual(COMPACT, 384, 77))
def test_a_head_has_few_block_sizes_and_few_products_in_all(shape: HeadShape) -> None:
    sizes = block_sizes(shape)
    assert len(sizes) <= MOST_BLOCK_SIZES
    assert list(sizes) == sorted(set(sizes))
    assert all(2 <= size <= shape.max_wanted for size in sizes)
    assert all(size & (size - 1) == 0 for size in sizes[:-1])
    assert sum(products(shape, size) for size in sizes) <= MAX_BLOCK_PRODUCTS


@given(SHAPES)
@example(usual(STANDARD, 384, 77))
@example(usual(COMPACT, 4096, 4096))
def test_blocks_of_other_sizes_are_refused(shape: HeadShape) -> None:
    sizes = block_sizes(shape)
    for texts in range(2, shape.max_wanted + 1):
        if texts in sizes:
            assert Layout.canonical(shape, texts).kind is LayoutKind.BLOCK
        else:
            with pytest.raises(LayoutError, match="expected one of 1"):
                Layout.canonical(shape, texts)


def test_block_sizes_of_usual_heads() -> None:
    assert block_sizes(usual(COMPACT, 384, 2)) == (2, 4, 8, 16, 32, 64, 73)
    assert block_sizes(usual(STANDARD, 384, 77)) == (2, 4, 8, 16, 32, 64, 128, 193)
    # The more products a layout has, the fewer sizes there are; perhaps none.
    assert block_sizes(usual(STANDARD, 384, 1000)) == (2, 4, 8, 24)
    assert block_sizes(usual(COMPACT, 4096, 4096, group_limit=1)) == ()


@given(SHAPES)
def test_the_larger_size_is_the_cheapest_for_each_text(shape: HeadShape) -> None:
    """A size that is no power of two costs less for each text than the power before it."""
    sizes = block_sizes(shape)
    if len(sizes) > 1 and sizes[-1] & (sizes[-1] - 1):
        before, best = (
            Fraction(Layout.canonical(shape, size).cost + 40, size) for size in sizes[-2:]
        )
        assert best < before


def test_a_model_that_answers_no_bulk_says_so() -> None:
    with pytest.raises(LayoutError, match=r"policy\.bulk"):
        Layout.canonical(usual(COMPACT, 384, 22), 500)


def test_unused_coefficients_are_zero() -> None:
    layout = Layout.canonical(usual(COMPACT, 100, 7), 2)
    stride = layout.group * layout.block_length
    query = layout.pack_embeddings(np.ones((2, 100)))
    assert query.sum() == 200
    assert not query[:, stride + layout.block_length :].any()
    assert not query[:, layout.block_length : stride].any()
    weights = layout.pack_weight(np.ones((7, 100)))
    assert weights.sum() == 700


# --- plans ----------------------------------------------------------------------------------------


def cost_of(requests: list[int], shape: HeadShape) -> int:
    return sum(Layout.canonical(shape, texts).cost + (40 if texts > 1 else 0) for texts in requests)


@given(
    SHAPES,
    st.integers(0, 3000),
)
def test_plans_send_every_text_once_and_never_cost_more_than_single_queries(
    shape: HeadShape, texts: int
) -> None:
    requests = plan(shape, texts)
    assert sum(requests) == texts
    assert all(size >= 1 for size in requests)
    assert cost_of(requests, shape) <= cost_of([1] * texts, shape)
    for size in requests:  # each is one that the service takes
        if Layout.canonical(shape, size).kind is LayoutKind.BULK:
            assert shape.bulk
            assert size > shape.dimensions  # where the charge is one for each text


@given(shapes(st.sampled_from([1, 2, 8, 77, 1000, 4096]), st.just(False)), st.integers(1, 60))
def test_no_cheaper_plan_exists(shape: HeadShape, texts: int) -> None:
    """Of all ways to cut so many texts into requests: looked for in another order."""
    texts = min(texts, shape.max_wanted)
    cost = {0: 0}
    sizes = {size: cost_of([size], shape) for size in (1, *block_sizes(shape))}
    for sent in range(texts):
        for size, added in sizes.items():
            found = cost[sent] + added
            cost[sent + size] = min(found, cost.get(sent + size, found))
    assert cost_of(plan(shape, texts), shape) == cost[texts]


def test_plans_of_a_usual_head() -> None:
    shape = usual(COMPACT, 384, 77)

    def planned(texts: int, *, bulk: bool = False) -> list[int]:
        return plan(replace(shape, bulk=bulk), texts)

    assert planned(0) == []
    assert planned(1) == [1]
    assert planned(64) == [64]
    assert planned(67) == [64, *planned(3)]
    most = max(block_sizes(shape))
    assert set(planned(3000)[:30]) == {most}
    assert planned(3000, bulk=True) == [2048, 952]
    assert planned(384, bulk=True) == planned(384)
