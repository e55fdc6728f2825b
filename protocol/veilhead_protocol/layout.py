"""Where features, texts and classes sit in polynomials.

The layout is a canonical function of the counts, the parameter set and the head's exponent. Both
sides compute it, it is stated in every message, and the service refuses any other.

The single layout: one text, cut into pieces of at most N features, one query polynomial a piece.
A weight polynomial carries a group of G classes (one class when there are several pieces). Row r
of a group is reversed into coefficients r t .. r t + t - 1, t being the block length, so that the
product with the query has <w_r, x> at coefficient r t + t - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veilhead_protocol.errors import LayoutError
from veilhead_protocol.parameters import ParameterSet

#: Largest embedding and largest number of classes of a head.
MAX_DIMENSIONS: Final = 4096
MAX_CLASSES: Final = 4096


class LayoutKind(IntEnum):
    """How texts and features share polynomials; the value is the byte on the wire."""

    SINGLE = 1


def group_size(parameters: ParameterSet, dimensions: int, exponent: int) -> int:
    """G, classes that share one weight polynomial in the single layout."""
    fitting = parameters.poly_modulus_degree // dimensions
    return max(1, min(fitting, parameters.max_wanted(exponent)))


@dataclass(frozen=True)
class Layout:
    """The single layout of one head.

    Attributes:
        kind: always single in this version.
        degree: N.
        texts: texts in one request.
        dimensions: d, values in an embedding.
        classes: C, logits in an answer.
        block_length: t, features in one block.
        pieces: query polynomials, ceil(d / N).
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
        cls, parameters: ParameterSet, *, texts: int, dimensions: int, classes: int, exponent: int
    ) -> Layout:
        """The one layout that both sides accept for these counts.

        Raises:
            LayoutError: when the counts are out of range.
        """
        if texts != 1:
            raise LayoutError(f"got {texts} texts in one request, expected 1")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise LayoutError(f"got {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
        if not 1 <= classes <= MAX_CLASSES:
            raise LayoutError(f"got {classes} classes, expected 1 to {MAX_CLASSES}")
        degree = parameters.poly_modulus_degree
        return cls(
            kind=LayoutKind.SINGLE,
            degree=degree,
            texts=texts,
            dimensions=dimensions,
            classes=classes,
            block_length=min(dimensions, degree),
            pieces=-(-dimensions // degree),
            group=group_size(parameters, dimensions, exponent),
        )

    @property
    def replies(self) -> int:
        """Polynomials in a reply: one for every group of classes."""
        return -(-self.classes // self.group)

    @property
    def products(self) -> int:
        """Polynomial products that one query costs: what its time is proportional to."""
        return self.replies * self.pieces

    def wanted(self, reply: int) -> NDArray[np.intp]:
        """Coefficients of reply polynomial `reply` that hold logits, in class order: [<= G]."""
        rows = min(self.group, self.classes - reply * self.group)
        return np.arange(rows, dtype=np.intp) * self.block_length + self.block_length - 1

    def pack_embedding(self, embedding: NDArray[np.float64]) -> NDArray[np.float64]:
        """Embedding [d] as coefficients of the query polynomials: [pieces, N]."""
        packed = np.zeros((self.pieces, self.degree))
        packed.reshape(-1)[: self.dimensions] = embedding
        return packed

    def pack_weight(self, weight: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weight [C, d] as coefficients of the weight polynomials: [replies, pieces, N]."""
        block = self.block_length
        padded = np.zeros((self.replies * self.group, self.pieces * block))
        padded[: self.classes, : self.dimensions] = weight
        # [replies, group, pieces, block] -> [replies, pieces, group, block], each block reversed
        blocks = padded.reshape(self.replies, self.group, self.pieces, block)
        blocks = blocks.transpose(0, 2, 1, 3)[..., ::-1]
        packed = np.zeros((self.replies, self.pieces, self.degree))
        packed[..., : self.group * block] = blocks.reshape(self.replies, self.pieces, -1)
        return packed
