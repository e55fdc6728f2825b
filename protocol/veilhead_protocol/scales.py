"""Scales of one head: how large its numbers are on the ciphertext, and how exact its answers.

From the weights follow an exponent e, the power of two 2^k that the head is divided by before it is
served, the scales Delta and Delta_w, the bound F of the noise that floods each answer, the bits
kappa of a reply's residues, the most classes that may share a polynomial, and a bound on the error
of a logit. These are public. What they are derived from (the norms of the rows) is not kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veilhead_protocol.errors import ScaleError
from veilhead_protocol.parameters import ERROR_VARIANCE, MAX_SERVED_EXPONENT, ParameterSet

#: The client rounds every logit as it is served to a multiple of this before anything else sees it:
#: an unrounded value is an exact linear equation in the secret key.
LOGIT_STEP: Final = 2.0**-12

#: The flood is uniform in [-Delta / 2^11, Delta / 2^11].
FLOOD_SHIFT: Final = 11

#: Largest Euclidean norm of a row's quantisation error, as it is served.
QUANTISATION_TOLERANCE: Final = 3.7e-4

#: The published error bound is a multiple of this times 2^k.
BOUND_STEP: Final = 2.0**-14

#: Least log2 of flood over noise; below it the reply's noise would tell of the weights.
MIN_FLOOD_RATIO_BITS: Final = 6.0

#: Deviations at which a sum of independent noise terms counts as bounded.
TAIL: Final = 8.0

#: Largest exponent e of a head.
MAX_EXPONENT: Final = 24

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

    A head is served divided by 2^k, and the client multiplies the logits by 2^k after it has
    rounded them. Scales and bits are those of the served head; `error_bound` and `logit_step` are
    in units of a logit.

    Attributes:
        exponent: e; every logit, bias included, is below 2^e in magnitude.
        downscale_bits: k.
        scale_bits: log2 Delta, the scale of a reply.
        weight_scale_bits: log2 Delta_w, the scale of the weights.
        flood_bits: log2 F, the bound of the flood.
        reply_bits: kappa, bits of a reply's residue.
        group_limit: most classes that may share a weight polynomial, a power of two.
        error_bound: bound on |logit error| for an embedding in the unit ball, including the
            rounding to `logit_step`.
    """

    exponent: int
    downscale_bits: int
    scale_bits: int
    weight_scale_bits: int
    flood_bits: int
    reply_bits: int
    group_limit: int
    error_bound: float

    @property
    def query_scale_bits(self) -> int:
        """log2 Delta_x, the scale of the embedding."""
        return self.scale_bits - self.weight_scale_bits

    @property
    def served_exponent(self) -> int:
        """e - k; every logit is served below 2 to this power."""
        return self.exponent - self.downscale_bits

    @property
    def logit_step(self) -> float:
        """What logits are multiples of, once the client has rounded and multiplied them."""
        return math.ldexp(LOGIT_STEP, self.downscale_bits)

    @classmethod
    def of_exponent(
        cls,
        parameters: ParameterSet,
        exponent: int,
        *,
        downscale_bits: int,
        weight_scale_bits: int,
        group_limit: int,
        error_bound: float,
    ) -> HeadScales:
        """All public numbers follow from these and the parameter set."""
        served = exponent - downscale_bits
        scale_bits = parameters.residue_bits - 1 - served
        return cls(
            exponent=exponent,
            downscale_bits=downscale_bits,
            scale_bits=scale_bits,
            weight_scale_bits=weight_scale_bits,
            flood_bits=scale_bits - FLOOD_SHIFT,
            reply_bits=served + 21,
            group_limit=group_limit,
            error_bound=error_bound,
        )


def quantise(weight: NDArray[np.float64], weight_scale_bits: int) -> NDArray[np.float64]:
    """rint(W Delta_w) / Delta_w, same shape [C, d], of weights as they are served."""
    scale = 2.0**weight_scale_bits
    quantised: NDArray[np.float64] = np.rint(weight * scale) / scale
    return quantised


def served_weight(weight: NDArray[np.float64], scales: HeadScales) -> NDArray[np.float64]:
    """W / 2^k, quantised, same shape [C, d]: the weights that are really served."""
    return quantise(np.ldexp(weight, -scales.downscale_bits), scales.weight_scale_bits)


def plan_scales(
    weight: NDArray[np.float64],
    bias: NDArray[np.float64],
    parameters: ParameterSet,
) -> HeadScales:
    """Scales for a head of weight [C, d] and bias [C], both finite, for embeddings of norm <= 1.

    The formulas are derived in docs/protocol.md.

    Raises:
        ScaleError: when a logit can pass 2^MAX_EXPONENT, with what to do about it.
    """
    for downscale_bits in range(MAX_EXPONENT + 1):
        found = _plan_served(
            np.ldexp(weight, -downscale_bits), np.ldexp(bias, -downscale_bits), parameters
        )
        if found is None:
            continue
        exponent = found.exponent + downscale_bits
        if exponent > MAX_EXPONENT:
            break
        return HeadScales.of_exponent(
            parameters,
            exponent,
            downscale_bits=downscale_bits,
            weight_scale_bits=found.weight_scale_bits,
            group_limit=found.group_limit,
            error_bound=math.ldexp(found.error_bound, downscale_bits),
        )
    raise ScaleError(
        f"a logit of this head can exceed 2^{MAX_EXPONENT}; divide weight and bias by a power "
        "of two (the top label stays the same) or give a smaller embedding_scale"
    )


def _plan_served(
    weight: NDArray[np.float64], bias: NDArray[np.float64], parameters: ParameterSet
) -> HeadScales | None:
    """Scales of a head that is served as it is; None when it has to be made smaller first."""
    # Rows whose logits are far too large need not be quantised to be refused.
    with np.errstate(over="ignore"):
        largest_row = (np.linalg.norm(weight, axis=1) + np.abs(bias)).max()
    if largest_row > 2.0 ** (MAX_SERVED_EXPONENT + 1):
        return None
    quantised, weight_scale_bits, quantisation_error = _quantised(weight)
    norms = np.linalg.norm(quantised, axis=1)  # [C]
    largest_logit = float((norms + np.abs(bias)).max())
    # 2^-8 is room for flood, noise and truncation: no answer reaches half the prime.
    exponent = max(0, math.ceil(math.log2(largest_logit + 2.0**-8)))
    if exponent > MAX_SERVED_EXPONENT:
        return None
    scales = HeadScales.of_exponent(
        parameters,
        exponent,
        downscale_bits=0,
        weight_scale_bits=weight_scale_bits,
        group_limit=1,
        error_bound=math.inf,
    )
    delta, flood = 2.0**scales.scale_bits, 2.0**scales.flood_bits
    secret_weight = 2 * parameters.poly_modulus_degree / 3  # expected squared norm of a secret
    key_variance = ERROR_VARIANCE * (2 * secret_weight + 1)

    def noise(group: int) -> float:
        # The weights of a group meet in a coefficient's noise. Layouts differ in how many
        # consecutive rows that are and where they begin: the largest run bounds them all.
        rows = min(group, len(norms))
        largest_group = float(np.convolve(norms**2, np.ones(rows), mode="valid").max())
        # 10.5 + 1/12: the query's error, and the rounding of its plaintext.
        query_variance = (ERROR_VARIANCE + 0.1) * 4.0**weight_scale_bits * largest_group
        return TAIL * math.sqrt(query_variance + key_variance)

    powers = [1 << bits for bits in range(parameters.max_wanted(exponent).bit_length())]
    groups = [group for group in powers if math.log2(flood / noise(group)) >= MIN_FLOOD_RATIO_BITS]
    if not groups:
        return None
    group_limit = max(groups)
    truncation = (
        TAIL * math.sqrt((secret_weight + 1) / 12) * parameters.prime / 2.0**scales.reply_bits
    )
    error = quantisation_error + LOGIT_STEP / 2
    error += (flood + noise(group_limit) + truncation) / delta
    return HeadScales.of_exponent(
        parameters,
        exponent,
        downscale_bits=0,
        weight_scale_bits=weight_scale_bits,
        group_limit=group_limit,
        error_bound=math.ceil(error / BOUND_STEP) * BOUND_STEP,
    )


def _quantised(weight: NDArray[np.float64]) -> tuple[NDArray[np.float64], int, float]:
    """Quantised weights [C, d], log2 Delta_w, and the largest norm of a row's error."""
    for bits in range(FEWEST_WEIGHT_BITS, MOST_WEIGHT_BITS + 1):
        quantised = quantise(weight, bits)
        error = float(np.linalg.norm(weight - quantised, axis=1).max())
        if error <= QUANTISATION_TOLERANCE:
            return quantised, bits, error
    raise AssertionError("a row of 4,096 weights is quantised to 2^-30 within the tolerance")


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


def round_logits(served: NDArray[np.float64], scales: HeadScales) -> NDArray[np.float64]:
    """Logits, same shape, of values as they were served: the only form in which they leave.

    They are rounded to multiples of `LOGIT_STEP` first and multiplied by 2^k after: rounding after
    the multiplication would keep digits of the noise, which tell of the key.
    """
    rounded: NDArray[np.float64] = np.rint(served / LOGIT_STEP) * LOGIT_STEP
    return np.ldexp(rounded, scales.downscale_bits)
