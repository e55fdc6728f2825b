"""What attacks found as plots: one an attack, each with the line that chance or a claim draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from veilhead_benchmarks.plots import Plot, legend_above, new_figure
from veilhead_benchmarks.rows import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: A figure as `attacks.results.AttackResult` writes it.
_Entry = Mapping[str, Any]

#: Of colour-blind readers too (Okabe and Ito).
_COLOURS: Final = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0C000", "#999999",
)  # fmt: skip

#: How a system is drawn where several are in one plot.
_STYLES: Final = {
    "plaintext": {"linestyle": "--", "marker": "", "alpha": 0.6},
    "veilhead": {"linestyle": "-", "marker": "o", "markersize": 4},
}
_OTHER: Final = {"linestyle": ":", "marker": "x", "markersize": 6}


@dataclass(frozen=True)
class _Found:
    """The figures of one attack."""

    entries: tuple[_Entry, ...]

    def having(self, **values: Any) -> _Found:
        """Those whose fields have these values."""
        kept = (
            entry
            for entry in self.entries
            if all(entry.get(name) == value for name, value in values.items())
        )
        return _Found(tuple(kept))

    def of_metric(self, start: str) -> _Found:
        """Those whose metric begins so."""
        return _Found(tuple(entry for entry in self.entries if entry["metric"].startswith(start)))

    def each(self, field: str) -> list[Any]:
        """The values of a field, each once, in order."""
        return list(dict.fromkeys(entry.get(field) for entry in self.entries))

    def points(self) -> tuple[list[float], list[float]]:
        """Where, and how much, in order."""
        found = sorted((entry["at"], entry["value"]) for entry in self.entries)
        return [at for at, _ in found], [value for _, value in found]


def attack_plots(results: Results) -> list[Plot]:
    """All plots that the file has figures for."""
    entries = _Found(tuple(results.extra.get("attacks", ())))
    made = []
    for attack, make in _PLOTS.items():
        found = entries.having(attack=attack)
        if found.entries:
            made.append(make(found))
    return [plot for plot in made if plot is not None]


def _bars(
    axes: Axes, groups: Mapping[str, Mapping[str, float]], chance: float | None, value: str
) -> None:
    """Bars side by side, from the left: one group a tick, one colour a name."""
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    height = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        places = [place for place, bars in enumerate(groups.values()) if name in bars]
        axes.barh(
            [place + (index - (len(names) - 1) / 2) * height for place in places],
            [bars[name] for bars in groups.values() if name in bars],
            height,
            label=name,
            color=_COLOURS[index % len(_COLOURS)],
        )
    axes.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(value)
    if chance is not None:
        axes.axvline(chance, color="black", linewidth=1, label="chance")


def _extraction(found: _Found) -> Plot | None:
    shares = found.of_metric("share of held-out texts")
    curves = [curve for curve in shares.each("curve") if curve]
    if not curves:
        return None
    figure, (axes,) = new_figure()
    for colour, curve in zip(_COLOURS, curves, strict=False):
        axes.plot([], [], color=colour, linewidth=3, label=curve)
        for system in shares.having(curve=curve).each("system"):
            at, values = shares.having(curve=curve, system=system).points()
            axes.plot(at, values, color=colour, **_style(system))
    for system in shares.each("system"):
        axes.plot([], [], color="black", label=system, **_style(system))
    axes.set_xscale("log")
    right = axes.get_xlim()[1]
    axes.set_xlim(right=right)
    for entry in found.of_metric("share, with a budget").entries:
        axes.axvspan(entry["at"], right, color="black", alpha=0.06, linewidth=0)
        axes.axvline(
            entry["at"], color="black", linewidth=1, label=f"a budget of {entry['at']:,.0f} texts"
        )
        axes.plot(entry["at"], entry["value"], marker="*", markersize=13, color="black")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("queries")
    axes.set_ylabel("share of held-out texts labelled alike")
    legend_above(figure)
    return Plot(
        "Attack: copying a head",
        "A copy made from so many answers: to unit vectors (`basis`), to ordinary texts, to these "
        "by an interface that returns probabilities (`log-ratio`) or labels. Curves of one colour "
        "lie upon each other: ours gives what plaintext logits give, and so does a naive service. "
        "A budget cuts every curve at its number: the star is what a thief had when a service with "
        "that budget refused the next text, and the grey part was never answered.",
        figure,
    )


def _style(system: str) -> dict[str, Any]:
    return dict(_STYLES.get(system, _OTHER))


def _membership(found: _Found) -> Plot | None:
    rates, areas = found.of_metric("true positives"), found.of_metric("AUC")
    if not rates.entries or not areas.entries:
        return None
    figure, (left, right) = new_figure(width=9.0, columns=2)
    for axes, part, value in ((left, rates, "true positives"), (right, areas, "AUC")):
        groups: dict[str, dict[str, float]] = {}
        metrics = part.each("metric")
        for entry in part.entries:
            name = value if len(metrics) == 1 else entry["metric"]
            groups.setdefault(entry["target"], {})[name] = entry["value"]
        chances = part.each("chance")
        _bars(
            axes, groups, chances[0] if len(chances) == 1 else None, metrics[0] if metrics else ""
        )
    least = min(entry["value"] for entry in rates.entries)
    if least > 0:
        left.set_xscale("log")
        left.set_xlim(left=least / 3)
    right.set_xlim(left=0.4)
    right.set_yticks([])
    legend_above(figure)
    return Plot(
        "Attack: membership",
        "LiRA against heads with and without privacy, both panels in the same order: members found "
        "at 0.1 % false positives, logarithmic, and the area under the curve.",
        figure,
    )


def _inversion(found: _Found) -> Plot | None:
    decoded, named = found.of_metric("decoder"), found.of_metric("retrieval")
    if not decoded.entries or not named.entries:
        return None
    figure, (left, right) = new_figure(width=9.0, columns=2)
    for axes, part, value in (
        (left, decoded, "words: mean AUC"),
        (right, named, "share of texts named"),
    ):
        groups = {_wrapped(entry["target"]): {value: entry["value"]} for entry in part.entries}
        _bars(axes, groups, part.entries[0]["chance"], value)
        axes.set_xlim(0, 1)
    right.set_yticks([])
    legend_above(figure)
    return Plot(
        "Attack: inversion",
        "What a decoder of words and a search among candidates make of an embedding, and of what "
        "crosses the wire; both panels in the same order.",
        figure,
    )


def _attributes(found: _Found) -> Plot | None:
    groups: dict[str, dict[str, float]] = {}
    for entry in found.entries:
        attribute = entry["metric"].removeprefix("accuracy: ")
        groups.setdefault(_wrapped(entry["target"]), {})[attribute] = entry["value"]
    figure, (axes,) = new_figure(height=0.9 + 0.7 * len(groups))
    _bars(axes, groups, 0.5, "share guessed rightly")
    axes.set_xlim(0, 1)
    legend_above(figure)
    return Plot(
        "Attack: attributes",
        "What is told of a person by an embedding, whatever the text is classified for. "
        "De-identification takes out what it knows, and no names.",
        figure,
    )


def _adversarial(found: _Found) -> Plot | None:
    curves = [curve for curve in found.each("curve") if curve]
    if not curves:
        return None
    figure, (axes,) = new_figure()
    for colour, curve in zip(_COLOURS, curves, strict=False):
        at, values = found.having(curve=curve).points()
        axes.plot(at, values, label=curve, color=colour, marker="o")
    axes.set_xticks(sorted({entry["at"] for entry in found.entries if entry.get("curve")}))
    axes.set_ylim(0, 1)
    axes.set_xlabel("words edited, one typo each")
    axes.set_ylabel("accuracy")
    legend_above(figure)
    return Plot(
        "Attack: adversarial text",
        "Accuracy over the number of edited words, the most important ones first.",
        figure,
    )


def _audit(found: _Found) -> Plot | None:
    curves = [curve for curve in found.each("curve") if curve]
    if not curves:
        return None
    figure, (axes,) = new_figure(height=3.6)
    claims = sorted({entry["at"] for entry in found.entries if entry.get("curve")})
    for index, (colour, curve) in enumerate(zip(_COLOURS, curves, strict=False)):
        at, values = found.having(curve=curve).points()
        offset = (index - (len(curves) - 1) / 2) * 0.3
        axes.bar([claims.index(x) + offset for x in at], values, 0.28, label=curve, color=colour)
    for place, claim in enumerate(claims):
        axes.hlines(
            claim,
            place - 0.45,
            place + 0.45,
            color="black",
            label="what is claimed",
        )
    axes.set_xticks(range(len(claims)), [f"claims {claim:g}" for claim in claims])
    axes.set_ylabel("epsilon: lower bound at 95 %")
    legend_above(figure)
    return Plot(
        "Audit of private training",
        "A bound above what is claimed refutes the claim; one below proves nothing by itself.",
        figure,
    )


def _wrapped(text: str) -> str:
    """A long name on two lines, broken at its last comma."""
    if len(text) < 24:
        return text
    before, comma, after = text.rpartition(", ")
    return f"{before},\n{after}" if comma else text


_PLOTS: Final[Mapping[str, Callable[[_Found], Plot | None]]] = {
    "extraction": _extraction,
    "inversion": _inversion,
    "attributes": _attributes,
    "membership": _membership,
    "dp-audit": _audit,
    "adversarial-text": _adversarial,
}
