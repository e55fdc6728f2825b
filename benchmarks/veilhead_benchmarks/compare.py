"""Two runs, case by case: what became slower, larger or less exact.

Times of two machines say nothing about the code: both files name theirs, and a difference is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from veilhead_benchmarks.rows import MEASURES, SIZES, Results

#: Errors are maxima over few values: they vary by more than times do.
_ERROR_FACTOR: Final = 2.0

#: Sizes do not vary from run to run but by compression: one in a hundred is a change.
_SIZE_THRESHOLD: Final = 1.01

#: Below this many milliseconds a ratio is one of clocks.
_LEAST_MS: Final = 0.02


@dataclass(frozen=True)
class Change:
    """One figure in both runs.

    Attributes:
        case: subject, system and so on.
        field: which figure.
        old: in the first run.
        new: in the second.
        ratio: how many times worse the second is; below one it is better.
        limit: the largest ratio that is no regression.
    """

    case: str
    field: str
    old: float
    new: float
    ratio: float
    limit: float

    @property
    def is_regression(self) -> bool:
        """Whether it became worse by more than the limit."""
        return self.ratio > self.limit


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common, and what they have not.

    Attributes:
        changes: every figure that both have, in the order of the second run.
        gone: cases of the first run that the second lacks.
        added: the reverse.
        machines: how the two machines differ, or an empty text.
    """

    changes: tuple[Change, ...]
    gone: tuple[str, ...]
    added: tuple[str, ...]
    machines: str

    @property
    def regressions(self) -> tuple[Change, ...]:
        """The changes for the worse, the worst first."""
        worse = (change for change in self.changes if change.is_regression)
        return tuple(sorted(worse, key=lambda change: change.ratio / change.limit, reverse=True))


def compare(old: Results, new: Results, threshold: float = 1.25) -> Comparison:
    """Compare two runs.

    Args:
        old: what to compare with.
        new: what is judged.
        threshold: from how many times the time on (or fewer texts a second) it is a regression.

    Raises:
        ValueError: when the threshold is not above one.
    """
    if not threshold > 1:
        raise ValueError(f"got a threshold of {threshold}, expected more than 1")
    before, after = dict(_figures(old, threshold)), dict(_figures(new, threshold))
    changes = [
        Change(case, field, before[case, field].value, figure.value, worse, figure.limit)
        for (case, field), figure in after.items()
        if (case, field) in before and (worse := _worse(before[case, field], figure)) is not None
    ]
    old_cases, new_cases = ({case for case, _ in figures} for figures in (before, after))
    return Comparison(
        tuple(changes),
        tuple(sorted(old_cases - new_cases)),
        tuple(sorted(new_cases - old_cases)),
        _machines(old, new),
    )


@dataclass(frozen=True)
class _Figure:
    value: float
    limit: float
    more_is_worse: bool = True


def _figures(results: Results, threshold: float) -> Iterator[tuple[tuple[str, str], _Figure]]:
    """Every figure of a run by its case and field."""
    limits = {
        **dict.fromkeys(MEASURES, threshold),
        **dict.fromkeys(SIZES, _SIZE_THRESHOLD),
        "max_error": _ERROR_FACTOR,
    }
    for row in results.rows:
        for field, limit in limits.items():
            value = getattr(row, field)
            if value is not None and not (field in MEASURES and value < _LEAST_MS):
                yield (_case_name(row.case), field), _Figure(float(value), limit)
    for entry in results.extra.get("throughput", ()):
        if entry["load"] == "closed":
            case = f"throughput, {entry['classes']} classes, {entry['workers']} workers"
            rate = float(entry["texts_per_second"])
            yield (case, "texts_per_second"), _Figure(rate, threshold, more_is_worse=False)


def _case_name(case: tuple[Any, ...]) -> str:
    subject, system, parameters, d, classes, batch = case
    counts = [
        f"{what}={value}"
        for what, value in (("d", d), ("classes", classes), ("batch", batch))
        if value is not None
    ]
    return ", ".join([subject, system, parameters, *counts])


def _worse(before: _Figure, after: _Figure) -> float | None:
    """How many times worse; None when there is nothing to divide by."""
    one, other = before.value, after.value
    if not after.more_is_worse:
        one, other = other, one
    return None if not one else other / one


def _machines(old: Results, new: Results) -> str:
    differing = [
        f"{name}: {old.environment.get(name)} before, {new.environment.get(name)} now"
        for name in ("processor", "cores", "machine", "python")
        if old.environment.get(name) != new.environment.get(name)
    ]
    return "; ".join(differing)


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print regressions, and how many figures were compared."""
    if comparison.machines:
        console.print(f"different machines: {comparison.machines}", style="yellow", markup=False)
    regressions = comparison.regressions
    if regressions:
        table = Table("case", "figure", "before", "now", "times worse", "limit")
        for change in regressions:
            table.add_row(
                change.case,
                change.field,
                f"{change.old:.4g}",
                f"{change.new:.4g}",
                f"{change.ratio:.2f}",
                f"{change.limit:.2f}",
            )
        console.print(table, markup=False)
    for what, cases in (("gone", comparison.gone), ("new", comparison.added)):
        if cases:
            console.print(f"{what}: {len(cases)} cases, {cases[0]} first", markup=False)
    better = sum(change.ratio * change.limit < 1 for change in comparison.changes)
    console.print(
        f"{len(comparison.changes)} figures compared: {len(regressions)} worse, {better} better",
        highlight=False,
    )
