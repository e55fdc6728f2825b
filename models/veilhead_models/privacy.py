"""Differential privacy's accounts: how much noise a budget asks for, and what a run may claim.

A full-batch run of noised gradient steps is a composition of Gaussian mechanisms, and that is one
Gaussian mechanism again: of parameter mu, the root of the sum of (sensitivity / noise)^2 (Dong,
Roth and Su, Gaussian Differential Privacy, 2019, corollary 3.3). Its epsilon at a given delta has a
closed form (Balle and Wang, Improving the Gaussian Mechanism, ICML 2018, theorem 8). Noise is
calibrated by it, and counted once more by the privacy loss distributions of `dp-accounting`, from
the single steps. A run whose two accounts differ is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from typing import Any, Final, Literal

from veilhead_protocol.errors import ModelError, PrivacyError

#: One row of the training split more or less.
ADJACENCY: Final = "add-remove"

DEFAULT_DELTA: Final = 1e-5

#: Above it, a guarantee is a number without a meaning.
MAX_EPSILON: Final = 20.0

#: A head is refused when `rows * mu` is below this for each class: it would be mostly noise. On
#: icd10-chapters such a head lost half of its accuracy.
FEWEST_ROWS_PER_CLASS: Final = 10.0

#: Noise is calibrated for a budget so much smaller, and both accounts must stay within the budget.
_CALIBRATION_MARGIN: Final = 1e-5

#: What two neighbouring data sets differ by one of, and what that is.
Unit = Literal["row", "record"]
_UNITS: Final[Mapping[Unit, str]] = {"row": "row", "record": "record (all of its tokens)"}

#: What the guarantee says nothing about; `unit` stands for what neighbours differ by.
_NOT_COVERED: Final = (
    "the public backbone and what it was trained on",
    "the choice of the method and of its constants, which were fixed on public data",
    "the label set, which is taken as public",
    "the choice of data set and split, and how often training was run",
    "the training report and the held-out {unit}s, which stay with the vendor",
    "texts that are sent for classification",
    "several {unit}s of one person: the guarantee is for one {unit}",
)


@dataclass(frozen=True)
class PrivacyBudget:
    """How much one row of the training split may change what is published.

    Attributes:
        epsilon: the bound on the privacy loss, above 0 and at most `MAX_EPSILON`.
        delta: the probability that the bound may be missed with; below 1 by number of rows.
        insecure_large_epsilon: allow an epsilon above `MAX_EPSILON`, which protects nobody.

    Raises:
        PrivacyError: when epsilon or delta means nothing.
    """

    epsilon: float
    delta: float = DEFAULT_DELTA
    insecure_large_epsilon: bool = False

    def __post_init__(self) -> None:
        # Written so that NaN is refused too.
        if not 0 < self.epsilon < math.inf:
            raise PrivacyError(f"got epsilon {self.epsilon}, expected a number above 0")
        if self.epsilon > MAX_EPSILON and not self.insecure_large_epsilon:
            raise PrivacyError(
                f"got epsilon {self.epsilon:g}, expected at most {MAX_EPSILON:g}: beyond that the "
                "guarantee is empty; train without differential privacy, and say so"
            )
        if not 0 < self.delta < 1:
            raise PrivacyError(f"got delta {self.delta}, expected a number between 0 and 1")

    @cached_property
    def mu(self) -> float:
        """The parameter of the Gaussian mechanism that just meets the budget."""
        optimize, _ = _scipy()
        target = self.epsilon * (1 - _CALIBRATION_MARGIN)
        found: float = optimize.brentq(
            lambda mu: gaussian_delta(mu, target) - self.delta,
            1e-9,
            2 * math.sqrt(self.epsilon) + 10,
            xtol=1e-14,
        )
        return found

    def check_rows(self, rows: int, classes: int) -> None:
        """Refuse a budget that so many rows cannot be trained under.

        Raises:
            PrivacyError: when delta is above 1 by rows, or the noise would drown the rows.
        """
        if rows * self.delta > 1:
            raise PrivacyError(
                f"delta {self.delta:g} is above 1/{rows}, one by the number of rows: publishing "
                "one whole row at random would meet it; give a smaller delta"
            )
        needed = math.ceil(FEWEST_ROWS_PER_CLASS * classes / self.mu)
        if rows < needed:
            raise PrivacyError(
                f"got {rows} rows for {classes} classes, expected at least {needed} at epsilon "
                f"{self.epsilon:g}: a head of fewer would be mostly noise; collect more rows, "
                "merge classes, or give a larger epsilon"
            )


@dataclass(frozen=True)
class Release:
    """A Gaussian mechanism that was applied so many times.

    Attributes:
        noise_multiplier: standard deviation of its noise by its sensitivity.
        times: how many times.
    """

    noise_multiplier: float
    times: int = 1


@dataclass(frozen=True)
class PrivacyStatement:
    """What a training run guarantees: goes into the manifest, as `about.privacy`.

    Attributes:
        epsilon: what is claimed; every account is at most this.
        delta: as in `PrivacyBudget`.
        adjacency: which data sets are neighbours.
        unit: what they differ by.
        mechanism: what the noise is added to.
        accountants: epsilon by accountant.
        clip_norm: largest Euclidean norm of a unit's gradient.
        noise_multiplier: of a step's noise, relative to `clip_norm`.
        steps: noised steps.
        not_covered: what the guarantee says nothing about.
    """

    epsilon: float
    delta: float
    adjacency: str
    unit: str
    mechanism: str
    accountants: dict[str, float]
    clip_norm: float
    noise_multiplier: float
    steps: int
    not_covered: tuple[str, ...]

    @classmethod
    def of_run(
        cls,
        budget: PrivacyBudget,
        *,
        steps: Release,
        count: Release,
        clip_norm: float,
        unit: Unit = "row",
    ) -> PrivacyStatement:
        """The statement of a run that noised its steps and its count of rows, or other units.

        Raises:
            PrivacyError: when an account exceeds the budget.
            ModelError: when `dp-accounting` is not installed.
        """
        closed = closed_form_epsilon((steps, count), budget.delta)
        distributions = pld_epsilon((steps, count), budget.delta)
        accountants = {
            "gaussian, closed form": closed,
            f"dp-accounting {version('dp-accounting')}, pld": distributions,
        }
        for name, epsilon in accountants.items():
            if not epsilon <= budget.epsilon:
                raise PrivacyError(
                    f"the run costs epsilon {epsilon:.6g} by {name}, expected at most "
                    f"{budget.epsilon:g}: its noise does not fit its budget"
                )
        return cls(
            epsilon=budget.epsilon,
            delta=budget.delta,
            adjacency=ADJACENCY,
            unit=f"one {_UNITS[unit]} of the training split",
            mechanism=(
                "full-batch gradient descent: sums of clipped gradients, and the number of "
                f"{unit}s, with discrete Gaussian noise"
            ),
            accountants=accountants,
            clip_norm=clip_norm,
            noise_multiplier=steps.noise_multiplier,
            steps=steps.times,
            not_covered=tuple(item.format(unit=unit) for item in _NOT_COVERED),
        )

    def to_json(self) -> dict[str, Any]:
        """The statement as something that JSON can carry."""
        return asdict(self) | {"not_covered": list(self.not_covered)}


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The least delta that a Gaussian mechanism of parameter mu has at this epsilon."""
    _, log_ndtr = _scipy()
    first = math.exp(log_ndtr(mu / 2 - epsilon / mu))
    return float(first - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)))


def closed_form_epsilon(releases: tuple[Release, ...], delta: float) -> float:
    """The least epsilon of all releases together at this delta, by the closed form."""
    optimize, _ = _scipy()
    mu = math.sqrt(sum(found.times / found.noise_multiplier**2 for found in releases))
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    highest = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1  # zCDP's, which is larger
    return float(optimize.brentq(lambda epsilon: gaussian_delta(mu, epsilon) - delta, 0.0, highest))


@lru_cache(maxsize=64)
def pld_epsilon(releases: tuple[Release, ...], delta: float) -> float:
    """The same by the privacy loss distributions of `dp-accounting`, which round up.

    Raises:
        ModelError: when `dp-accounting` is not installed.
    """
    try:
        from dp_accounting import GaussianDpEvent, NeighboringRelation, SelfComposedDpEvent
        from dp_accounting.pld import PLDAccountant
    except ImportError as error:
        raise missing_package(error) from error
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    for found in releases:
        accountant.compose(
            SelfComposedDpEvent(GaussianDpEvent(found.noise_multiplier), found.times)
        )
    return float(accountant.get_epsilon(delta))


def missing_package(error: ImportError) -> ModelError:
    """What to tell somebody who lacks a package of the `train` extra."""
    return ModelError(
        f"differentially private training needs {error.name}, which is not installed: "
        "pip install 'veilhead[train]'"
    )


def _scipy() -> tuple[Any, Any]:
    """SciPy's root finding, and the logarithm of the normal distribution function."""
    try:
        from scipy import optimize
        from scipy.special import log_ndtr
    except ImportError as error:
        raise missing_package(error) from error
    return optimize, log_ndtr
