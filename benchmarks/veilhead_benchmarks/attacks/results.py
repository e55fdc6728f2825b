"""What an attack reports, and the file that holds it.

Every figure comes with what chance would give and with what is expected of it: an attack that ought
to succeed and does not is as much of a failure as a protection that does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, cast

from rich.table import Table

from veilhead_benchmarks.console import wide_console
from veilhead_benchmarks.rows import Results, Row, System, environment

#: Deviations that a figure may be away from chance and still be at it: one in 15,000 is further.
AT_CHANCE_DEVIATIONS: Final = 4.0

_VERSIONS: Final = ("veilhead", "tenseal", "numpy", "scikit-learn")


@dataclass(frozen=True)
class AttackResult:
    """One figure of one attack.

    Attributes:
        attack: its name.
        system: `plaintext` where nothing protects, `veilhead` for what this project gives out, or
            a peer.
        target: what was attacked.
        metric: what `value` is.
        value: the figure.
        samples: texts, rows, canaries or trials that it rests on.
        chance: what guessing gives; None where that means nothing.
        expected: what should be so: `above 0.9`, `at chance`; empty where there is no promise.
        holds: whether it is so; None where there is no promise.
        curve: the curve that the figure is a point of; empty where it is none.
        at: where on it: queries, edited words, a claimed epsilon.
    """

    attack: str
    system: str
    target: str
    metric: str
    value: float
    samples: int
    chance: float | None = None
    expected: str = ""
    holds: bool | None = None
    curve: str = ""
    at: float | None = None

    def row(self) -> Row:
        """The figure as a row of the benchmarks' form; docs/benchmarks.md describes the fields."""
        promise = f", expected {self.expected}: {self.holds}" if self.expected else ""
        return Row(
            subject=f"attack-{self.attack}",
            system=cast("System", self.system),  # whoever reads the file checks it
            parameters=f"{self.target}, {self.metric}",
            d=None,
            classes=None,
            batch=None,
            note=f"{self.value:.4g} over {self.samples}{promise}",
        )


def above(result: AttackResult, bound: float) -> AttackResult:
    """The result, expected to be above a bound."""
    return _judged(result, f"above {bound:.4g}", result.value > bound)


def at_most(result: AttackResult, bound: float) -> AttackResult:
    """The result, expected to be no more than a bound."""
    return _judged(result, f"at most {bound:.4g}", result.value <= bound)


def at_chance_count(result: AttackResult) -> AttackResult:
    """The result, a share of `samples`, expected where chance alone leaves it as often.

    For shares near zero, where counts are few and no normal distribution fits.
    """
    from scipy.stats import binom, norm

    if result.chance is None:
        raise ValueError("a result without a chance cannot be at it")
    tail = norm.sf(AT_CHANCE_DEVIATIONS)
    low = binom.ppf(tail, result.samples, result.chance) / result.samples
    high = binom.isf(tail, result.samples, result.chance) / result.samples
    return _judged(
        result, f"{result.chance:.4g}, {low:.3g} to {high:.3g}", low <= result.value <= high
    )


def at_chance(result: AttackResult, deviation: float) -> AttackResult:
    """The result, expected within `AT_CHANCE_DEVIATIONS` standard deviations of chance."""
    if result.chance is None:
        raise ValueError("a result without a chance cannot be at it")
    margin = AT_CHANCE_DEVIATIONS * deviation
    return _judged(
        result,
        f"{result.chance:.4g} within {margin:.2g}",
        abs(result.value - result.chance) <= margin,
    )


def contains_chance(result: AttackResult, interval: tuple[float, float]) -> AttackResult:
    """The result, expected to have chance within the interval that goes with it."""
    if result.chance is None:
        raise ValueError("a result without a chance cannot be at it")
    low, high = interval
    return _judged(
        result,
        f"{result.chance:.4g} within {low:.2g} to {high:.2g}, its 95 % interval",
        low <= result.chance <= high,
    )


def not_above(result: AttackResult, interval: tuple[float, float], bound: float) -> AttackResult:
    """The result, expected to have no interval that is above a bound as a whole."""
    low, high = interval
    return _judged(
        result,
        f"at most {bound:.4g}, as far as {low:.2g} to {high:.2g} tells, its 95 % interval",
        low <= bound,
    )


def _judged(result: AttackResult, expected: str, holds: bool) -> AttackResult:
    return replace(result, expected=expected, holds=bool(holds))


def write_results(results: Sequence[AttackResult], out: Path, seconds: Mapping[str, float]) -> None:
    """Write the file: environment, rows of the benchmarks' form, and the figures themselves.

    `seconds` is how long each attack took.
    """
    Results(
        environment(_VERSIONS) | {"seconds": dict(seconds)},
        tuple(result.row() for result in results),
        {"attacks": [asdict(result) for result in results]},
    ).save(out)


def print_results(results: Sequence[AttackResult]) -> None:
    """A table of every figure."""
    table = Table("attack", "system", "target", "metric", "value", "chance", "over", "expected", "")
    for result in results:
        table.add_row(
            result.attack,
            result.system,
            result.target,
            result.metric,
            f"{result.value:.4g}",
            "" if result.chance is None else f"{result.chance:.4g}",
            str(result.samples),
            result.expected,
            {True: "holds", False: "BROKEN", None: ""}[result.holds],
        )
    wide_console().print(table)
