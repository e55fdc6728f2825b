"""Where texts, features and classes sit in polynomials.

The layout is a canonical function of the counts, the parameter set and the head's exponent. Both
sides compute it, it is stated in every message, and the service refuses any other.

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

#: Most query polynomials in one request: 14 MB in `compact`, 37 MB in `strong`.
MAX_PIECES: Final = 1024

#: Most logits in one answer.
MAX_LOGITS: Final = 2**20

#: Most products of one block request: what bounds the weight polynomials that it needs encoded.
MAX_BLOCK_PRODUCTS: Final = 4096

#: The cost of a layout in units of about 25 microseconds, of both sides and 1 Gbit/s between them:
#: a query polynomial (encrypted, sent, checked, expanded), a reply polynomial (zero encryption,
#: inverse transform, sent, decrypted) and a product. docs/protocol.md has the measurements. These
#: are part of the protocol: other numbers are other layouts.
QUERY_COST: Final = 20
REPLY_COST: Final = 20
PRODUCT_COST: Final = 1

#: The products of a bulk request are one matrix product: 2^16 multiplications cost a unit.
_BULK_SHIFT: Final = 16

#: What a request of several texts costs more than its layout: a fresh key, made and registered.
_KEY_COST: Final = 100

#: Larger groups than fit whole embeddings mean more noise, as the weights of a group meet in every
#: coefficient. Up to this exponent there is room for it under the flood in either set.
_GROUP: Final = 16
_GROUP_EXPONENT: Final = 6


class LayoutKind(IntEnum):
    """How many texts share polynomials; the value is the byte on the wire.

    A block stays within the hint limit of its set. Bulk passes it, and only some models allow it.
    """

    SINGLE = 1
    BLOCK = 2
    BULK = 3


def group_limit(parameters: ParameterSet, dimensions: int, exponent: int) -> int:
    """Most classes that share a weight polynomial in any layout of such a head."""
    whole = max(1, parameters.poly_modulus_degree // dimensions)
    most = max(whole, _GROUP) if exponent <= _GROUP_EXPONENT else whole
    return min(most, parameters.max_wanted(exponent))


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
    def canonical(
        cls,
        parameters: ParameterSet,
        *,
        texts: int,
        dimensions: int,
        classes: int,
        exponent: int,
        bulk: bool = False,
    ) -> Layout:
        """The one layout that both sides accept for these counts.

        Args:
            parameters: the parameter set.
            texts: texts in one request.
            dimensions: values in an embedding.
            classes: logits for each text.
            exponent: e of the head.
            bulk: whether the model allows requests beyond the hint limit.

        Raises:
            LayoutError: when the counts are out of range.
        """
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise LayoutError(f"got {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
        if not 1 <= classes <= MAX_CLASSES:
            raise LayoutError(f"got {classes} classes, expected 1 to {MAX_CLASSES}")
        most = most_texts(parameters, exponent, bulk=bulk)
        if not 1 <= texts <= most:
            clause = "" if bulk else "; policy.bulk: this model answers no bulk requests"
            raise LayoutError(f"got {texts} texts in one request, expected 1 to {most}{clause}")
        return _canonical(parameters, texts, dimensions, classes, exponent)

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


def most_texts(parameters: ParameterSet, exponent: int, *, bulk: bool) -> int:
    """Most texts that any request of a head may have: one wanted coefficient each, at least."""
    return parameters.poly_modulus_degree if bulk else parameters.max_wanted(exponent)


@lru_cache(maxsize=64)
def _wanted(texts: int, group: int, rows: int, block: int) -> NDArray[np.intp]:
    starts = np.arange(texts, dtype=np.intp)[:, np.newaxis] * (group * block)
    places = (starts + np.arange(rows, dtype=np.intp) * block + block - 1).reshape(-1)
    places.flags.writeable = False  # it is shared
    return places


@lru_cache(maxsize=4096)
def _canonical(
    parameters: ParameterSet, texts: int, dimensions: int, classes: int, exponent: int
) -> Layout:
    degree = parameters.poly_modulus_degree
    allowed = parameters.max_wanted(exponent)
    if texts > allowed:
        kind, groups = LayoutKind.BULK, 1
    else:
        kind = LayoutKind.SINGLE if texts == 1 else LayoutKind.BLOCK
        groups = min(group_limit(parameters, dimensions, exponent), allowed // texts, classes)
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
        if pieces > MAX_PIECES:
            continue
        if kind is LayoutKind.BLOCK and layout.products > MAX_BLOCK_PRODUCTS:
            continue
        if best is None or layout.cost < best.cost:
            best = layout
    if best is None:
        raise LayoutError(
            f"{texts} texts in one request are too many for {dimensions} dimensions and "
            f"{classes} classes: send fewer at once"
        )
    return best


def plan(
    parameters: ParameterSet,
    *,
    texts: int,
    dimensions: int,
    classes: int,
    exponent: int,
    bulk: bool = False,
) -> list[int]:
    """Texts in each request, so that so many texts cost least: the largest requests first.

    Bulk is only used for more texts than dimensions, where an answer costs no more of a budget than
    its texts.
    """
    blocks, best = _block_plans(parameters, dimensions, classes, exponent)
    most = len(blocks) - 1
    requests = []
    while bulk and texts > max(dimensions, most):
        size, cost = _bulk_size(parameters, texts, dimensions, classes, exponent)
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
def _block_plans(
    parameters: ParameterSet, dimensions: int, classes: int, exponent: int
) -> tuple[list[tuple[int, tuple[int, ...]]], int]:
    """The cost and the requests of the cheapest plan for 0, 1, 2, ... texts within the hint limit.

    And the number of texts that cost least each, which a long series is made of. Ties go to the
    larger requests.
    """
    costs: dict[int, int] = {}
    plans: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    for texts in range(1, most_texts(parameters, exponent, bulk=False) + 1):
        # Too many texts for a large head have no layout; one always has.
        with suppress(LayoutError):
            costs[texts] = _request_cost(
                _canonical(parameters, texts, dimensions, classes, exponent)
            )
        cost, size = min((plans[texts - size][0] + costs[size], -size) for size in costs)
        plans.append((cost, (-size, *plans[texts + size][1])))
    return plans, min(range(1, len(plans)), key=lambda size: plans[size][0] / size)


def _bulk_size(
    parameters: ParameterSet, texts: int, dimensions: int, classes: int, exponent: int
) -> tuple[int, float]:
    """The size and cost of the bulk request that is cheapest for each of its texts."""
    degree = parameters.poly_modulus_degree
    powers = [2**bits for bits in range(degree.bit_length())]
    choices = [(inf, -1, inf)]
    for size in (*powers, min(texts, degree)):
        if dimensions < size <= texts:
            with suppress(LayoutError):
                layout = _canonical(parameters, size, dimensions, classes, exponent)
                if layout.kind is LayoutKind.BULK:
                    cost = float(_request_cost(layout))
                    choices.append((cost / size, -size, cost))
    _, negated, lowest = min(choices)
    return -negated, lowest
