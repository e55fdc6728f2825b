"""Scales of one head: how large its numbers are on the ciphertext, and how exact its answers.

From the weights follow an exponent e, the scales Delta and Delta_w, the bound F of the noise that
floods each answer, the bits kappa of a reply's residues, and a bound on the error of a logit.
These are public. What they are derived from (the norms of the rows) is not kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veilhead_protocol.errors import ScaleError
from veilhead_protocol.layout import group_limit
from veilhead_protocol.parameters import ERROR_VARIANCE, MAX_EXPONENT, ParameterSet

#: The client rounds every logit to a multiple of this before anything else sees it: an unrounded
#: value is an exact linear equation in the secret key.
LOGIT_STEP: Final = 2.0**-12

#: The flood is uniform in [-Delta / 2^11, Delta / 2^11].
FLOOD_SHIFT: Final = 11

#: Largest Euclidean norm of a row's quantisation error.
QUANTISATION_TOLERANCE: Final = 3.7e-4

#: The published error bound is a multiple of this.
BOUND_STEP: Final = 2.0**-14

#: Least log2 of flood over noise; below it the reply's noise would tell of the weights.
MIN_FLOOD_RATIO_BITS: Final = 6.0

#: Deviations at which a sum of independent noise terms counts as bounded.
TAIL: Final = 8.0

#: log2 of the scales that weights are quantised with.
FEWEST_WEIGHT_BITS: Final = 8
MOST_WEIGHT_BITS: Final = 30

#: Of a double: the bits of its mantissa, the bias of its exponent, and the biased exponent of NaN
#: and infinity (IEEE 754).
_MANTISSA_BITS: Final = 52
_BIAS: Final = 1023
_NOT_FINITE: Final = 2047

#: What `project` keeps of a row, below its largest value: far more than a sum of squares does. And
#: the power of two below which it keeps nothing.
_RANGE_BITS: Final = 100
_MOST_POWER: Final = 500


@dataclass(frozen=True)
class HeadScales:
    """The public numbers of one head.

    Attributes:
        exponent: e; every logit, bias included, is below 2^e in magnitude.
        scale_bits: log2 Delta, the scale of a reply.
        weight_scale_bits: log2 Delta_w, the scale of the weights.
        flood_bits: log2 F, the bound of the flood.
        reply_bits: kappa, bits of a reply's residue.
        error_bound: bound on |logit error| for an embedding in the unit ball, including the
            rounding to `LOGIT_STEP`.
    """

    exponent: int
    scale_bits: int
    weight_scale_bits: int
    flood_bits: int
    reply_bits: int
    error_bound: float

    @property
    def query_scale_bits(self) -> int:
        """log2 Delta_x, the scale of the embedding."""
        return self.scale_bits - self.weight_scale_bits

    @classmethod
    def of_exponent(
        cls, parameters: ParameterSet, exponent: int, weight_scale_bits: int, error_bound: float
    ) -> HeadScales:
        """All public numbers follow from these and the parameter set."""
        scale_bits = parameters.data_modulus.bit_length() - 1 - exponent
        return cls(
            exponent=exponent,
            scale_bits=scale_bits,
            weight_scale_bits=weight_scale_bits,
            flood_bits=scale_bits - FLOOD_SHIFT,
            reply_bits=exponent + 21,
            error_bound=error_bound,
        )


def quantise(weight: NDArray[np.float64], weight_scale_bits: int) -> NDArray[np.float64]:
    """W_q = rint(W Delta_w) / Delta_w, same shape [C, d]: the weights that are really served."""
    scale = 2.0**weight_scale_bits
    quantised: NDArray[np.float64] = np.rint(weight * scale) / scale
    return quantised


def plan_scales(
    weight: NDArray[np.float64],
    bias: NDArray[np.float64],
    parameters: ParameterSet,
) -> HeadScales:
    """Scales for a head of weight [C, d] and bias [C], both finite, for embeddings of norm <= 1.

    The formulas are derived in docs/protocol.md.

    Raises:
        ScaleError: when the head is too large for the set, with what to do about it.
    """
    degree = parameters.poly_modulus_degree
    quantisation_error = math.inf
    for weight_scale_bits in range(FEWEST_WEIGHT_BITS, MOST_WEIGHT_BITS + 1):
        quantised = quantise(weight, weight_scale_bits)
        quantisation_error = float(np.linalg.norm(weight - quantised, axis=1).max())
        if quantisation_error <= QUANTISATION_TOLERANCE:
            break
    else:
        raise ScaleError(
            "the weights cannot be quantised to the required precision; divide weight and bias "
            "by a power of two and multiply the logits back"
        )
    norms = np.linalg.norm(quantised, axis=1)  # [C]
    largest_logit = float((norms + np.abs(bias)).max())
    exponent = max(0, math.ceil(math.log2(largest_logit + 2.0**-8)))
    if exponent > MAX_EXPONENT:
        raise ScaleError(
            f"a logit of this head can exceed 2^{MAX_EXPONENT}; divide weight and bias by a power "
            "of two (the top label stays the same) or give a smaller embedding_scale"
        )
    scales = HeadScales.of_exponent(parameters, exponent, weight_scale_bits, math.inf)
    delta = 2.0**scales.scale_bits
    flood = 2.0**scales.flood_bits

    # The weights of a group meet in a coefficient's noise. Layouts differ in how many consecutive
    # rows that are and where they begin: the largest run of the largest group bounds them all.
    rows = min(group_limit(parameters, weight.shape[1], exponent), len(norms))
    largest_group = float(np.convolve(norms**2, np.ones(rows), mode="valid").max())
    secret_weight = 2 * degree / 3  # expected squared norm of a ternary secret
    if parameters.special_prime is None:
        key_variance = ERROR_VARIANCE * (2 * secret_weight + 1)
    else:
        # Switching the key's noise down by the special prime leaves the rounding only.
        key_variance = (secret_weight + 1) / 12
    # 10.5 + 1/12: the query's error, and the rounding of its plaintext.
    query_variance = (ERROR_VARIANCE + 0.1) * 4.0**weight_scale_bits * largest_group
    noise = TAIL * math.sqrt(query_variance + key_variance)
    if math.log2(flood / noise) < MIN_FLOOD_RATIO_BITS:
        advice = (
            "use parameters='strong'"
            if parameters.special_prime is None
            else "divide weight and bias by a power of two"
        )
        raise ScaleError(
            f"the flood covers the noise of this head by {math.log2(flood / noise):.1f} bits, "
            f"expected at least {MIN_FLOOD_RATIO_BITS:.0f}: {advice}"
        )
    modulus = parameters.data_modulus
    truncation = TAIL * math.sqrt((secret_weight + 1) / 12) * modulus / 2.0**scales.reply_bits
    total = largest_logit * delta + flood + noise + truncation
    if total >= modulus / 2:
        raise ScaleError(
            f"an answer of this head can reach 2^{math.log2(total):.2f}, expected less than half "
            f"the modulus (2^{math.log2(modulus / 2):.2f}): divide weight and bias by two"
        )
    error = quantisation_error + (flood + noise + truncation) / delta + LOGIT_STEP / 2
    bound = math.ceil(error / BOUND_STEP) * BOUND_STEP
    return HeadScales.of_exponent(parameters, exponent, weight_scale_bits, bound)


def project(embeddings: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """Embeddings [..., d] divided by the manifest's scale, then projected onto the unit ball.

    Rows of norm above one are shortened to norm one, not refused: half of all normalised float32
    embeddings have a norm a hair above one.

    Every finite row has a finite projection, however large it is, and a row that holds NaN or
    infinity becomes NaN throughout: nothing is raised. What is below 2^-100 of a row's largest
    value, or below 2^-500, becomes zero, by its bits and before any arithmetic: on subnormal
    numbers that takes a hundred times as long, which would tell of them.
    """
    bits = np.asarray(embeddings, dtype=np.float64).view(np.int64)
    exponents = (bits >> _MANTISSA_BITS) & _NOT_FINITE  # biased; 0 of zeros and subnormal numbers
    largest = exponents.max(axis=-1, keepdims=True, initial=0)  # [..., 1]
    kept = exponents > np.maximum(largest - _RANGE_BITS, _BIAS - _MOST_POWER)
    # Each row times a power of two, exactly: its largest value is now in [1, 2), or all is zero.
    powers = np.clip(largest - _BIAS, -_MOST_POWER, None)
    reduced = ((bits - (powers << _MANTISSA_BITS)) * kept).view(np.float64)
    norms = np.linalg.norm(reduced, axis=-1, keepdims=True)
    # x / max(scale, |x|), where no scale counts beside the norms of the largest rows.
    ones = np.ldexp(scale, -np.minimum(powers, _MOST_POWER))
    projected = reduced / np.maximum(ones, norms)
    return np.where(largest == _NOT_FINITE, np.nan, projected)


def round_logits(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logits rounded to multiples of `LOGIT_STEP`: the only form in which they leave decryption."""
    rounded: NDArray[np.float64] = np.rint(logits / LOGIT_STEP) * LOGIT_STEP
    return rounded
