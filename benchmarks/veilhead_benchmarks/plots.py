"""A run as plots: matplotlib figures, one a question."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from veilhead_benchmarks.claims import own, ratio
from veilhead_benchmarks.rows import Results, Row
from veilhead_benchmarks.tables import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Of colour-blind readers too (Okabe and Ito); the same for a system in every plot.
_COLOURS: Final = {
    "veilhead standard": "#0072B2",
    "veilhead compact": "#56B4E9",
    "plaintext": "#999999",
    "tenseal-mm": "#D55E00",
    "tenseal-batched": "#E69F00",
    "tenseal-bsgs": "#F0C000",
    "concrete-ml-logreg": "#009E73",
    "concrete-ml-glwe": "#CC79A7",
}
_MARKERS: Final = dict(zip(_COLOURS, "osx^v<>D", strict=True))
_STEPS: Final = ("#CC79A7", "#0072B2", "#E69F00", "#999999")
_BOUND: Final = 2**-10


@dataclass(frozen=True)
class Plot:
    """A figure with a title and a sentence on how to read it."""

    title: str
    text: str
    figure: Figure


def plots(results: Results) -> list[Plot]:
    """All plots that the run has figures for."""
    made = (make(results) for make in _PLOTS)
    return [plot for plot in made if plot is not None]


def _label(row: Row) -> str:
    return f"veilhead {row.parameters}" if row.system == "veilhead" else row.system


def new_figure(
    width: float = 8.0, height: float = 4.2, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """An empty figure with so many axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.grid(visible=True, alpha=0.25)
        one.set_axisbelow(True)
    return figure, list(axes)


def _lines(
    axes: Axes,
    rows: Sequence[Row],
    x: Callable[[Row], float | None],
    y: Callable[[Row], float | None],
) -> None:
    """A line of points for every system, on two logarithmic axes."""
    for label in _COLOURS:
        found = [(x(row), y(row)) for row in rows if _label(row) == label]
        points = sorted((a, b) for a, b in found if a and b)
        if points:
            axes.plot(
                [a for a, _ in points],
                [b for _, b in points],
                label=label,
                color=_COLOURS[label],
                marker=_MARKERS[label],
                markersize=5,
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _decades(axes)


def _bars(axes: Axes, groups: dict[str, dict[str, float]], *, logarithmic: bool) -> None:
    """Bars side by side: one group a tick, one colour a system."""
    labels = [label for label in _COLOURS if any(label in bars for bars in groups.values())]
    width = 0.8 / max(1, len(labels))
    for index, label in enumerate(labels):
        places = [place for place, bars in enumerate(groups.values()) if label in bars]
        offset = (index - (len(labels) - 1) / 2) * width
        axes.bar(
            [place + offset for place in places],
            [bars[label] for bars in groups.values() if label in bars],
            width,
            label=label,
            color=_COLOURS[label],
        )
    axes.set_xticks(range(len(groups)), list(groups))
    if logarithmic:
        _decades(axes)


def legend_above(figure: Figure) -> None:
    """One legend above all axes: nothing of a plot lies below it."""
    found = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if found:
        figure.legend(
            list(found.values()), list(found), loc="outside upper left", ncols=5, fontsize=8
        )


def _decades(axes: Axes) -> None:
    """A logarithmic axis of whole decades, labelled at each."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_minor_formatter(lambda *_: "")


def _stacked(axes: Axes, columns: dict[str, dict[str, float]]) -> None:
    """One bar a column, its parts on each other."""
    parts = list(dict.fromkeys(part for column in columns.values() for part in column))
    base = [0.0] * len(columns)
    for part, colour in zip(parts, _STEPS, strict=False):
        values = [column.get(part, 0.0) for column in columns.values()]
        axes.bar(range(len(columns)), values, 0.6, bottom=base, label=part, color=colour)
        base = [below + value for below, value in zip(base, values, strict=True)]
    axes.set_xticks(range(len(columns)), list(columns))
    axes.legend(fontsize=8)


def _singles(results: Results) -> list[Row]:
    return results.find(subject="single", d=384, batch=1)


def _latency(results: Results) -> Plot | None:
    rows = [
        row
        for row in results.find(subject="single", system="veilhead", d=384, batch=1)
        if row.classes is not None and row.classes <= 200
    ]
    if not rows:
        return None
    figure, (axes,) = new_figure()
    _stacked(
        axes,
        {
            f"{row.classes}\n{row.parameters}": {
                "encrypt (client)": row.encrypt_ms or 0.0,
                "evaluate (service)": row.server_ms or 0.0,
                "decrypt (client)": row.decrypt_ms or 0.0,
            }
            for row in sorted(rows, key=lambda row: (row.classes or 0, row.parameters))
        },
    )
    axes.set_xlabel("classes and parameter set")
    axes.set_ylabel("milliseconds")
    return Plot(
        "Where the time of a single query goes",
        "Both sides in memory on one core, without the backbone and HTTP.",
        figure,
    )


def _by_classes(results: Results) -> Plot | None:
    rows = _singles(results)
    if not rows:
        return None
    figure, (axes,) = new_figure()
    _lines(axes, rows, lambda row: row.classes, lambda row: row.server_ms)
    axes.set_xlabel("classes")
    axes.set_ylabel("server milliseconds")
    legend_above(figure)
    return Plot(
        "Server time over classes",
        "One text, 384 dimensions, from request bytes to reply bytes; both axes are logarithmic.",
        figure,
    )


def _by_dimensions(results: Results) -> Plot | None:
    rows = results.find(
        subject="single", system="veilhead", parameters="standard", classes=20, batch=1
    )
    rows += results.find(subject="single", system="plaintext", classes=20, batch=1)
    if len({row.d for row in rows}) < 3:
        return None
    figure, (left, right) = new_figure(columns=2)
    _lines(left, rows, lambda row: row.d, lambda row: row.server_ms)
    left.set_ylabel("server milliseconds")
    _lines(right, rows, lambda row: row.d, lambda row: (row.bytes_up or 0) + (row.bytes_down or 0))
    right.set_ylabel("bytes up and down")
    right.yaxis.set_major_formatter(lambda value, _: size(value))
    for axes in (left, right):
        axes.set_xlabel("dimensions")
    legend_above(figure)
    return Plot("Cost over dimensions", "One text, 20 classes.", figure)


def _by_batch(results: Results) -> Plot | None:
    rows = results.find(subject="batch", d=384)
    classes = sorted({row.classes for row in rows if row.classes is not None})
    if not rows:
        return None
    figure, axes = new_figure(columns=len(classes))
    for one, count in zip(axes, classes, strict=True):
        chosen = [row for row in rows if row.classes == count]
        chosen += [
            row
            for row in _singles(results)
            if row.classes == count and _label(row) in ("veilhead standard", "plaintext")
        ]
        _lines(
            one,
            chosen,
            lambda row: row.batch,
            lambda row: 1e3 * row.server_ms / row.batch if row.server_ms and row.batch else None,
        )
        one.set_title(f"{count} classes", fontsize=10)
        one.set_xlabel("texts in one call")
    axes[0].set_ylabel("server microseconds a text")
    legend_above(figure)
    return Plot(
        "Server time a text over the batch",
        "384 dimensions. Veilhead chooses its requests itself: single queries, blocks or bulk.",
        figure,
    )


def _bytes(results: Results) -> Plot | None:
    rows = [row for row in _singles(results) if row.classes in (2, 20, 77)]
    if not rows:
        return None
    figure, (left, right) = new_figure(columns=2)

    def grouped(value: Callable[[Row], float | None]) -> dict[str, dict[str, float]]:
        groups: dict[str, dict[str, float]] = {}
        for row in rows:
            found = value(row)
            if found:
                groups.setdefault(f"{row.classes}", {})[_label(row)] = found
        return groups

    _bars(left, grouped(lambda row: row.bytes_keys), logarithmic=True)
    left.set_title("registered once", fontsize=10)
    _bars(right, grouped(lambda row: (row.bytes_up or 0) + (row.bytes_down or 0)), logarithmic=True)
    right.set_title("up and down, for each text", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("classes")
        axes.yaxis.set_major_formatter(lambda value, _: size(value))
    legend_above(figure)
    return Plot("Bytes", "Single queries, 384 dimensions; logarithmic.", figure)


def _ratios(results: Results) -> Plot | None:
    groups: dict[str, dict[str, float]] = {}
    for row in _singles(results):
        mine = own(results, row.classes or 0)
        found = ratio(row.server_ms, mine.server_ms if mine else None)
        if found and row.system not in ("veilhead", "plaintext"):
            groups.setdefault(f"{row.classes}", {})[_label(row)] = found
    if not groups:
        return None
    figure, (axes,) = new_figure()
    _bars(axes, groups, logarithmic=True)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xlabel("classes")
    axes.set_ylabel("server time over Veilhead's")
    legend_above(figure)
    return Plot(
        "Server time of others over Veilhead's",
        "Single queries, `standard`; below the line the other one is faster. Logarithmic.",
        figure,
    )


def _end_to_end(results: Results) -> Plot | None:
    mine = results.find(subject="end-to-end", system="veilhead")
    if not mine:
        return None
    figure, (left, right) = new_figure(columns=2)
    one_text = {}
    for row in sorted((row for row in mine if row.batch == 1), key=lambda row: row.classes or 0):
        plain = results.one(subject="end-to-end", system="plaintext", classes=row.classes, batch=1)
        parts = {
            "encrypt": row.encrypt_ms or 0.0,
            "evaluate": row.server_ms or 0.0,
            "decrypt": row.decrypt_ms or 0.0,
        }
        rest = (row.total_ms or 0.0) - sum(parts.values())
        one_text[f"{row.classes}"] = {**parts, "backbone and HTTP": max(0.0, rest)}
        one_text[f"{row.classes}\nplaintext"] = {
            "backbone and HTTP": (plain.total_ms or 0.0) if plain else 0.0
        }
    if one_text:
        _stacked(left, one_text)
    left.set_title("one text", fontsize=10)
    left.set_ylabel("milliseconds")
    for classes in sorted({row.classes or 0 for row in mine}):
        points = []
        for row in mine:
            plain = results.one(
                subject="end-to-end", system="plaintext", classes=classes, batch=row.batch
            )
            found = ratio(row.total_ms, plain.total_ms if plain else None)
            if row.classes == classes and found is not None:
                points.append((row.batch or 0, found))
        points.sort()
        right.plot(
            [batch for batch, _ in points],
            [found for _, found in points],
            marker="o",
            label=f"{classes} classes",
        )
    right.axhline(1.0, color="black", linewidth=1)
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    right.set_title("encrypted over plaintext", fontsize=10)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("classes" if axes is left else "texts in one call")
    return Plot(
        "End to end over HTTP",
        "CFPB narratives, backbone on CPU, against the twin of the service without privacy.",
        figure,
    )


def _throughput(results: Results) -> Plot | None:
    entries = results.extra.get("throughput", ())
    if not entries:
        return None
    figure, (left, right) = new_figure(columns=2)
    classes = sorted({entry["classes"] for entry in entries})
    for index, workers in enumerate((1, 2)):
        found = {
            entry["classes"]: entry["texts_per_second"]
            for entry in entries
            if entry["load"] == "closed" and entry["workers"] == workers
        }
        left.bar(
            [classes.index(count) + (index - 0.5) * 0.38 for count in found],
            list(found.values()),
            0.38,
            label=f"{workers} worker{'s' if workers > 1 else ''}",
            color=_STEPS[1] if workers == 1 else _STEPS[2],
        )
    left.set_xticks(range(len(classes)), [f"{count:,}" for count in classes])
    _decades(left)
    left.set_xlabel("classes")
    left.set_ylabel("texts a second, saturated")
    left.legend(fontsize=8)
    open_loads = [entry for entry in entries if entry["load"] == "open"]
    for entry, place in zip(open_loads, range(len(open_loads)), strict=True):
        for name, marker in (("p50_ms", "o"), ("p95_ms", "^"), ("p99_ms", "x")):
            right.plot(place, entry[name], marker=marker, color=_STEPS[1], linestyle="none")
    right.set_xticks(
        range(len(open_loads)),
        [f"{entry['classes']}\n{entry['offered_per_second']:.0f}/s" for entry in open_loads],
    )
    right.set_ylim(bottom=0)
    right.set_xlabel("classes and texts offered a second, one worker")
    right.set_ylabel("milliseconds: p50 (o), p95 (△), p99 (x)")
    return Plot("Throughput and waiting", "Single queries over HTTP, `standard`.", figure)


def _fidelity(results: Results) -> Plot | None:
    def points() -> Iterator[tuple[str, str, float]]:
        for row in results.rows:
            if row.max_error and row.system == "veilhead" and row.subject.startswith("fidelity/"):
                yield row.subject.partition("/")[2], _label(row), row.max_error
        for row in _singles(results):
            if row.max_error and row.system != "plaintext" and row.classes in (2, 20, 77):
                yield f"random, {row.classes} classes", _label(row), row.max_error

    groups: dict[str, dict[str, float]] = {}
    for where, label, error in points():
        groups.setdefault(where, {})[label] = error
    if not groups:
        return None
    figure, (axes,) = new_figure(width=9.0)
    for place, found in enumerate(groups.values()):
        for label, error in found.items():
            beside = place + 0.06 * (list(_COLOURS).index(label) - len(_COLOURS) / 2)
            axes.plot(
                beside, error, marker=_MARKERS[label], color=_COLOURS[label], linestyle="none"
            )
    used = [label for label in _COLOURS if any(label in found for found in groups.values())]
    handles: list[Any] = []
    for label in used:
        handles += axes.plot(
            [], [], marker=_MARKERS[label], color=_COLOURS[label], linestyle="none", label=label
        )
    handles.append(axes.axhline(_BOUND, color="black", linewidth=1, label="2^-10"))
    axes.set_yscale("log")
    axes.set_xticks(range(len(groups)), [name.replace(" ", "\n", 1) for name in groups])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel("largest distance from plaintext logits")
    axes.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return Plot(
        "Fidelity",
        "Trained heads on real texts, and the random heads of the single queries.",
        figure,
    )


_PLOTS: Final = (
    _ratios,
    _latency,
    _by_classes,
    _by_batch,
    _by_dimensions,
    _bytes,
    _end_to_end,
    _throughput,
    _fidelity,
)
