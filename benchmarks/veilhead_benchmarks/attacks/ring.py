"""Exact arithmetic in Z_q[X] / (X^N + 1), with Python integers.

Attackers compute with it, so that an attack that fails does not fail by the product's own code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Python integers, [N].
Residues = NDArray[Any]


def _root(degree: int, prime: int) -> int:
    """A primitive 2N-th root of one."""
    for base in range(2, 1000):
        root = pow(base, (prime - 1) // (2 * degree), prime)
        if pow(root, degree, prime) == prime - 1:
            return root
    raise ValueError(f"{prime} has no root of order {2 * degree}")


def _transform(values: Residues, root: int, prime: int) -> Residues:
    """Values of a cyclic polynomial at the powers of `root`; recursive, in natural order."""
    count = len(values)
    if count == 1:
        return values
    even = _transform(values[0::2], root * root % prime, prime)
    odd = _twist(_transform(values[1::2], root * root % prime, prime), root, prime)
    return np.concatenate([(even + odd) % prime, (even - odd) % prime])


def _twist(values: Residues, root: int, prime: int) -> Residues:
    power, powers = 1, np.empty(len(values), dtype=object)
    for index in range(len(values)):
        powers[index] = power
        power = power * root % prime
    twisted: Residues = values * powers % prime
    return twisted


def evaluate(coefficients: Residues, prime: int) -> Residues:
    """Values at the odd powers of a 2N-th root, [N]."""
    root = _root(len(coefficients), prime)
    values = np.array([int(value) % prime for value in coefficients], dtype=object)
    return _transform(_twist(values, root, prime), root * root % prime, prime)


def interpolate(values: Residues, prime: int) -> Residues:
    """The inverse of `evaluate`."""
    degree = len(values)
    inverse = pow(_root(degree, prime), -1, prime)
    cyclic = _transform(values, inverse * inverse % prime, prime) * pow(degree, -1, prime) % prime
    return _twist(cyclic, inverse, prime)


def multiply(left: Residues, right: Residues, prime: int) -> Residues:
    """The product of two polynomials."""
    return interpolate(evaluate(left, prime) * evaluate(right, prime) % prime, prime)


def divide(left: Residues, right: Residues, prime: int) -> Residues:
    """left / right, for a `right` that is invertible, as a uniform one almost always is."""
    inverses = np.array([pow(int(value), -1, prime) for value in evaluate(right, prime)], object)
    return interpolate(evaluate(left, prime) * inverses % prime, prime)


def centred(residues: Residues, modulus: int) -> Residues:
    """Residues as integers in (-modulus / 2, modulus / 2]."""
    half = modulus // 2
    return np.array([(int(value) + half) % modulus - half for value in residues], dtype=object)
