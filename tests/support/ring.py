"""Exact arithmetic in Z_q[X] / (X^N + 1) with Python integers: slow, plain, and not the product's.

Attackers compute with it, so that an attack that fails does not fail by the product's own code.
"""

from __future__ import annotations

import numpy as np


def _root(degree, prime):
    """A primitive 2N-th root of one."""
    for base in range(2, 1000):
        root = pow(base, (prime - 1) // (2 * degree), prime)
        if pow(root, degree, prime) == prime - 1:
            return root
    raise AssertionError("every prime of ours has such a root")


def _transform(values, root, prime):
    """Values of a cyclic polynomial at the powers of `root`; recursive, in natural order."""
    count = len(values)
    if count == 1:
        return values
    even = _transform(values[0::2], root * root % prime, prime)
    odd = _transform(values[1::2], root * root % prime, prime)
    powers = np.empty(count // 2, dtype=object)
    power = 1
    for index in range(count // 2):
        powers[index] = power
        power = power * root % prime
    odd = odd * powers % prime
    return np.concatenate([(even + odd) % prime, (even - odd) % prime])


def _twist(values, root, prime):
    power, powers = 1, np.empty(len(values), dtype=object)
    for index in range(len(values)):
        powers[index] = power
        power = power * root % prime
    return values * powers % prime


def evaluate(coefficients, prime):
    """Values at the odd powers of a 2N-th root, [N] of Python integers."""
    degree = len(coefficients)
    root = _root(degree, prime)
    values = np.array([int(value) % prime for value in coefficients], dtype=object)
    return _transform(_twist(values, root, prime), root * root % prime, prime)


def interpolate(values, prime):
    """The inverse of `evaluate`."""
    degree = len(values)
    root = _root(degree, prime)
    inverse = pow(root, -1, prime)
    cyclic = _transform(values, inverse * inverse % prime, prime) * pow(degree, -1, prime) % prime
    return _twist(cyclic, inverse, prime)


def multiply(left, right, prime):
    """The product of two polynomials, residues [N] of Python integers."""
    return interpolate(evaluate(left, prime) * evaluate(right, prime) % prime, prime)


def divide(left, right, prime):
    """left / right, for a `right` that is invertible, as a uniform one almost always is."""
    inverses = np.array([pow(int(value), -1, prime) for value in evaluate(right, prime)], object)
    return interpolate(evaluate(left, prime) * inverses % prime, prime)


def centred(residues, modulus):
    """Residues as integers in (-modulus / 2, modulus / 2]."""
    half = modulus // 2
    return np.array([(int(value) + half) % modulus - half for value in residues], dtype=object)
