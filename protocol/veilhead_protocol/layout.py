"""Where texts, features and classes sit in polynomials.

The layout is a canonical function of a head's public shape and the number of texts. Both sides
compute it, it is stated in every message, and the service refuses any other.

All layouts are one family. b texts share a query, G classes share a weight polynomial, and an
embedding is cut into P pieces of t features (b G t <= N). Piece i of text s is at coefficients
s G t .. s G t + t - 1 of query polynomial i; row r of a group is reversed at r t .. r t + t - 1 of
the weight polynomial of piece i. The products, summed over the pieces, have the logit of (s, r) at
coefficient s G t + r t + t - 1. What wraps around X^N + 1 lands below t - 1, where nothing is read.

More pieces make t smaller and G larger: more of a query, less of a reply. Of the possible cuts the
canonical one has the least `cost`, and the smallest G of those.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from math import inf
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veilhead_protocol.errors import LayoutError
from veilhead_protocol.parameters import ParameterSet

#: Largest embedding and largest number of classes of a head.
MAX_DIMENSIONS: Final = 4096
MAX_CLASSES: Final = 4096

#: Most query polynomials in one request: 28 MB in `standard`, 13 MB in `compact`.
MAX_PIECES: Final = 1024

#: Most logits in one answer.
MAX_LOGITS: Final = 2**20

#: Most products of a head's block layouts, all of them together: what bounds the weight polynomials
#: that a service encodes for them, each once.
MAX_BLOCK_PRODUCTS: Final = 4096

#: The cost of a layout in units of about 41 microseconds under `standard`, of both sides and of
#: 1 Gbit/s between them: a query polynomial (encrypted, sent, checked, expanded), a reply
#: polynomial (zero encryption, inverse transform, sent, decrypted) and a product.
#: docs/protocol.md has the measurements. These are part of the protocol: other numbers are other
#: layouts.
QUERY_COST: Final = 20
REPLY_COST: Final = 20
PRODUCT_COST: Final = 1

#: The products of a bulk request are one matrix product: 2^16 multiplications cost a unit.
_BULK_SHIFT: Final = 16

#: What a request of several texts costs more than its layout: a fresh key, made, sent and loaded.
_KEY_COST: Final = 40


class LayoutKind(IntEnum):
    """How many texts share polynomials; the value is the byte on the wire.

    A block stays within the hint limit of its set. Bulk passes it, and only some models allow it.
    """

    SINGLE = 1
    BLOCK = 2
    BULK = 3


@dataclass(frozen=True)
class HeadShape:
    """What of a head decides its layouts. All of it is public.

    Attributes:
        parameters: the parameter set.
        dimensions: d, values in an embedding.
        classes: C, logits for each text.
        exponent: logits are served below 2^exponent.
        group_limit: most classes that may share a weight polynomial.
        bulk: whether the model allows requests beyond the hint limit.
    """

    parameters: ParameterSet
    dimensions: int
    classes: int
    exponent: int
    group_limit: int
    bulk: bool = False

    @property
    def max_wanted(self) -> int:
        """Most wanted coefficients in one reply polynomial, but for bulk."""
        return self.parameters.max_wanted(self.exponent)


@dataclass(frozen=True)
class Layout:
    """One request's layout.

    Attributes:
        kind: single, block or bulk, by the number of texts.
        degree: N.
        texts: b, texts in one request.
        dimensions: d, values in an embedding.
        classes: C, logits in an answer.
        block_length: t, features in one block.
        pieces: P, query polynomials, ceil(d / t).
        group: G, classes in one weight polynomial.
    """

    kind: LayoutKind
    degree: int
    texts: int
    dimensions: int
    classes: int
    block_length: int
    pieces: int
    group: int

    @classmethod
    def canonical(cls, shape: HeadShape, texts: int) -> Layout:
        """The one layout that both sides accept for so many texts in one request.

        Raises:
            LayoutError: when the head takes no request of so many.
        """
        if not 1 <= shape.dimensions <= MAX_DIMENSIONS:
            raise LayoutError(f"got {shape.dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
        if not 1 <= shape.classes <= MAX_CLASSES:
            raise LayoutError(f"got {shape.classes} classes, expected 1 to {MAX_CLASSES}")
        if texts != 1 and texts not in block_sizes(shape):
            if not shape.max_wanted < texts <= shape.parameters.poly_modulus_degree:
                sizes = ", ".join(map(str, (1, *block_sizes(shape))))
                raise LayoutError(f"got {texts} texts in one request, expected one of {sizes}")
            if not shape.bulk:
                raise LayoutError(
                    f"got {texts} texts in one request, expected at most {shape.max_wanted}; "
                    "policy.bulk: this model answers no bulk requests"
                )
        return _layout(shape, texts)

    @property
    def replies(self) -> int:
        """Polynomials in a reply: one for every group of classes."""
        return -(-self.classes // self.group)

    @property
    def products(self) -> int:
        """Products of a query polynomial and a weight polynomial."""
        return self.replies * self.pieces

    @property
    def cost(self) -> int:
        """What a request costs, in the units of `QUERY_COST`: its time is proportional to it."""
        if self.kind is LayoutKind.BULK:
            products = self.classes * self.dimensions * self.degree >> _BULK_SHIFT
        else:
            products = PRODUCT_COST * self.products
        return QUERY_COST * self.pieces + REPLY_COST * self.replies + products

    def wanted(self, reply: int) -> NDArray[np.intp]:
        """Coefficients of reply polynomial `reply` that hold logits: [b * (<= G)], text by text.

        Not to be written to.
        """
        rows = min(self.group, self.classes - reply * self.group)
        return _wanted(self.texts, self.group, rows, self.block_length)

    def pack_embeddings(self, embeddings: NDArray[np.float64]) -> NDArray[np.float64]:
        """Embeddings [b, d] as coefficients of the query polynomials: [P, N]."""
        padded = np.zeros((self.texts, self.pieces * self.block_length))
        padded[:, : self.dimensions] = embeddings
        blocks = padded.reshape(self.texts, self.pieces, self.block_length)
        packed = np.zeros((self.pieces, self.degree))
        stride = self.group * self.block_length
        places = packed[:, : self.texts * stride].reshape(self.pieces, self.texts, stride)
        places[..., : self.block_length] = blocks.transpose(1, 0, 2)
        packed[:, : self.texts * stride] = places.reshape(self.pieces, -1)
        return packed

    def pack_weight(self, weight: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weight [C, d] as the first G t coefficients of the weight polynomials: [R, P, G t].

        All their other coefficients are zero.
        """
        block = self.block_length
        padded = np.zeros((self.replies * self.group, self.pieces * block))
        padded[: self.classes, : self.dimensions] = weight
        # [R, G, P, t] -> [R, P, G, t], each block reversed
        blocks = padded.reshape(self.replies, self.group, self.pieces, block)
        blocks = blocks.transpose(0, 2, 1, 3)[..., ::-1]
        return np.ascontiguousarray(blocks).reshape(self.replies, self.pieces, -1)

    def logits(self, replies: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Wanted values of every reply polynomial, in the order of `wanted`, as [b, C]."""
        return np.concatenate([values.reshape(self.texts, -1) for values in replies], axis=1)


@lru_cache(maxsize=64)
def _wanted(texts: int, group: int, rows: int, block: int) -> NDArray[np.intp]:
    starts = np.arange(texts, dtype=np.intp)[:, np.newaxis] * (group * block)
    places = (starts + np.arange(rows, dtype=np.intp) * block + block - 1).reshape(-1)
    places.flags.writeable = False  # it is shared
    return places


@lru_cache(maxsize=4096)
def _layout(shape: HeadShape, texts: int) -> Layout:
    """The cheapest layout of so many texts, whether or not a request may have so many."""
    degree, dimensions, classes = (
        shape.parameters.poly_modulus_degree,
        shape.dimensions,
        shape.classes,
    )
    if texts > shape.max_wanted:
        kind, groups = LayoutKind.BULK, 1
    else:
        kind = LayoutKind.SINGLE if texts == 1 else LayoutKind.BLOCK
        groups = min(shape.group_limit, shape.max_wanted // texts, classes)
    if texts * classes > MAX_LOGITS:
        raise LayoutError(
            f"got {texts} texts of {classes} classes in one request, "
            f"expected at most {MAX_LOGITS} logits"
        )
    best: Layout | None = None
    for group in range(1, groups + 1):
        longest = degree // (texts * group)
        if longest == 0:
            break
        pieces = -(-dimensions // longest)
        block_length = -(-dimensions // pieces)
        layout = Layout(kind, degree, texts, dimensions, classes, block_length, pieces, group)
        if pieces <= MAX_PIECES and (best is None or layout.cost < best.cost):
            best = layout
    if best is None:
        raise LayoutError(
            f"{texts} texts in one request are too many for {dimensions} dimensions and "
            f"{classes} classes: send fewer at once"
        )
    return best


@lru_cache(maxsize=256)
def block_sizes(shape: HeadShape) -> tuple[int, ...]:
    """The numbers of texts that a block request of a head may have, in rising order: at most ten.

    They are the powers of two, while all their layouts together have at most half of
    `MAX_BLOCK_PRODUCTS`, and the one larger size that costs least for each text, of those whose
    products fit into the rest. So a service encodes few weight polynomials, and each of them once.
    """
    sizes: list[int] = []
    left: float = MAX_BLOCK_PRODUCTS
    size = 2
    while size <= shape.max_wanted:
        products = _products(shape, size)
        if left - products < MAX_BLOCK_PRODUCTS // 2:
            break
        sizes.append(size)
        left -= products
        size *= 2
    larger = [
        (_request_cost(_layout(shape, texts)) / texts, texts)
        for texts in range(max(sizes, default=1) + 1, shape.max_wanted + 1)
        if _products(shape, texts) <= left
    ]
    if larger:
        cost, best = min(larger)
        if not sizes or cost < _request_cost(_layout(shape, sizes[-1])) / sizes[-1]:
            sizes.append(best)
    return tuple(sizes)


def _products(shape: HeadShape, texts: int) -> float:
    """Products of the layout of a block of so many texts; infinite where there is none."""
    with suppress(LayoutError):
        return _layout(shape, texts).products
    return inf


def plan(shape: HeadShape, texts: int) -> list[int]:
    """Texts in each request, so that so many texts cost least: the largest requests first.

    Bulk is only used for more texts than dimensions, where an answer costs no more of a budget than
    its texts.
    """
    blocks, best = _block_plans(shape)
    most = len(blocks) - 1
    requests = []
    while shape.bulk and texts > max(shape.dimensions, most):
        size, cost = _bulk_size(shape, texts)
        if cost / size > blocks[best][0] / best:
            break
        requests.append(size)
        texts -= size
    while texts > most:
        requests += blocks[best][1]
        texts -= best
    return requests + list(blocks[texts][1])


def _request_cost(layout: Layout) -> int:
    return layout.cost + (_KEY_COST if layout.texts > 1 else 0)


@lru_cache(maxsize=64)
def _block_plans(shape: HeadShape) -> tuple[list[tuple[int, tuple[int, ...]]], int]:
    """The cost and the requests of the cheapest plan for 0, 1, 2, ... texts within the hint limit.

    And the number of texts that cost least each, which a long series is made of. Ties go to the
    larger requests.
    """
    costs = {size: _request_cost(_layout(shape, size)) for size in (1, *block_sizes(shape))}
    plans: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    for texts in range(1, shape.max_wanted + 1):
        cost, size = min(
            (plans[texts - size][0] + costs[size], -size) for size in costs if size <= texts
        )
        plans.append((cost, (-size, *plans[texts + size][1])))
    return plans, min(range(1, len(plans)), key=lambda size: plans[size][0] / size)


def _bulk_size(shape: HeadShape, texts: int) -> tuple[int, float]:
    """The size and cost of the bulk request that is cheapest for each of its texts."""
    degree = shape.parameters.poly_modulus_degree
    powers = [2**bits for bits in range(degree.bit_length())]
    choices = [(inf, -1, inf)]
    for size in (*powers, min(texts, degree)):
        if shape.dimensions < size <= texts:
            with suppress(LayoutError):
                layout = _layout(shape, size)
                if layout.kind is LayoutKind.BULK:
                    cost = float(_request_cost(layout))
                    choices.append((cost / size, -size, cost))
    _, negated, lowest = min(choices)
    return -negated, lowest
