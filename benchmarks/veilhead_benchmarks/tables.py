"""A run as tables: for the console, for Markdown and for the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console
from rich.table import Table as RichTable

from veilhead_benchmarks.claims import claims, own, ratio
from veilhead_benchmarks.rows import Results, Row

#: The title of the table that a report begins with.
CLAIMS: Final = "Claims"


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: what it is about.
        columns: the head.
        rows: the cells.
        note: what to know before reading it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def to_markdown(self) -> str:
        """The table as Markdown, below a heading."""
        lines = [f"### {self.title}", ""]
        if self.note:
            lines += [self.note, ""]
        lines += [_markdown_row(self.columns), _markdown_row(["---"] * len(self.columns))]
        lines += map(_markdown_row, self.rows)
        return "\n".join(lines) + "\n"

    def print(self, console: Console) -> None:
        """Print the table."""
        table = RichTable(*self.columns, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table, markup=False)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def number(value: float | None, form: str = ".3g") -> str:
    """A number, or an empty text."""
    return "" if value is None else format(value, form)


def milliseconds(value: float | None) -> str:
    """Milliseconds with three or so significant digits."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def size(value: float | None) -> str:
    """Bytes, short."""
    if value is None:
        return ""
    for limit, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value:.0f} B"


def _classes(row: Row) -> int:
    return row.classes or 0


def claims_table(results: Results) -> Table:
    """What is claimed, and what was measured."""
    return Table(
        CLAIMS,
        ("claim", "measured", "target", "met"),
        tuple(
            (
                claim.name,
                f"{claim.value:,.4g} {claim.unit}".strip(),
                f"{'≥' if claim.at_least else '≤'} {claim.target:,g} {claim.unit}".strip(),
                "yes" if claim.met else "no",
            )
            for claim in claims(results)
        ),
    )


def single_table(results: Results) -> Table:
    """Single queries of every system."""
    rows = sorted(
        (row for row in results.find(subject="single", d=384)),
        key=lambda row: (_classes(row), row.server_ms or 0.0),
    )
    cells = []
    for row in rows:
        mine = own(results, _classes(row))
        cells.append(
            (
                str(row.classes),
                row.system,
                row.parameters,
                milliseconds(row.server_ms),
                number(ratio(row.server_ms, mine.server_ms if mine else None)),
                milliseconds(row.encrypt_ms),
                milliseconds(row.decrypt_ms),
                size(row.bytes_keys),
                size(row.bytes_up),
                size(row.bytes_down),
                number(row.max_error, ".1e"),
            )
        )
    return Table(
        "Single queries, 384 dimensions",
        (
            "classes", "system", "parameters", "server ms", "over ours", "encrypt ms",
            "decrypt ms", "keys", "up", "down", "max error",
        ),
        tuple(cells),
        "One text; `over ours` is server time by that of Veilhead's `standard` in the same run.",
    )  # fmt: skip


def batch_table(results: Results) -> Table:
    """Many texts at once, by text."""
    rows = sorted(
        results.find(subject="batch"), key=lambda row: (_classes(row), row.batch or 0, row.system)
    )
    return Table(
        "Many texts at once",
        (
            "texts", "classes", "system", "server µs a text", "encrypt µs a text",
            "decrypt µs a text", "up a text", "down a text", "max error", "requests",
        ),
        tuple(
            (
                f"{row.batch:,}",
                str(row.classes),
                row.system,
                *(number(_each(1e3, value, row), ".4g") for value in
                  (row.server_ms, row.encrypt_ms, row.decrypt_ms)),
                size(_each(1, row.bytes_up, row)),
                size(_each(1, row.bytes_down, row)),
                number(row.max_error, ".1e"),
                row.note,
            )
            for row in rows
        ),
    )  # fmt: skip


def _each(factor: float, value: float | None, row: Row) -> float | None:
    return None if value is None or not row.batch else factor * value / row.batch


def floor_table(results: Results) -> Table:
    """How far requests are from their floor."""
    cells = []
    for floor in results.find(subject="floor"):
        subject = "single" if floor.batch == 1 else "batch"
        found = results.one(
            subject=subject, system="veilhead", parameters=floor.parameters, d=floor.d,
            classes=floor.classes, batch=floor.batch,
        )  # fmt: skip
        if found is not None:
            cells.append(
                (
                    f"{floor.batch:,}",
                    str(floor.classes),
                    str(floor.d),
                    floor.parameters,
                    milliseconds(found.server_ms),
                    milliseconds(floor.server_ms),
                    number(ratio(found.server_ms, floor.server_ms), ".2f"),
                    floor.note,
                )
            )
    return Table(
        "Distance from the floor",
        ("texts", "classes", "d", "parameters", "server ms", "floor ms", "times", "the floor is"),
        tuple(cells),
        "The floor: fresh encryptions of zero, products and inverse transforms, as timed alone.",
    )


def primitives_table(results: Results) -> Table:
    """Single operations."""
    rows = [row for row in results.rows if row.subject.startswith("primitives/")]
    return Table(
        "Primitives",
        ("operation on one polynomial", "parameters", "µs"),
        tuple(
            (
                row.subject.partition("/")[2],
                row.parameters,
                number(None if row.server_ms is None else 1e3 * row.server_ms, ".1f"),
            )
            for row in rows
        ),
    )


def end_to_end_table(results: Results) -> Table:
    """From text to label, against the plaintext twin."""
    cells = []
    for mine in results.find(subject="end-to-end", system="veilhead"):
        plain = results.one(
            subject="end-to-end", system="plaintext", classes=mine.classes, batch=mine.batch
        )
        other = None if plain is None else plain.total_ms
        cells.append(
            (
                f"{mine.batch:,}",
                str(mine.classes),
                milliseconds(mine.total_ms),
                milliseconds(other),
                number(ratio(mine.total_ms, other), ".3f"),
                milliseconds(mine.encrypt_ms),
                milliseconds(mine.server_ms),
                milliseconds(mine.decrypt_ms),
                size(mine.bytes_up),
                size(mine.bytes_down),
                mine.note,
            )
        )
    return Table(
        "End to end over HTTP, backbone on CPU",
        (
            "texts", "classes", "encrypted ms", "plaintext ms", "ratio", "encrypt ms",
            "evaluate ms", "decrypt ms", "up", "down", "note",
        ),
        tuple(cells),
        "CFPB narratives; both ways embed them with the same backbone.",
    )  # fmt: skip


def throughput_table(results: Results) -> Table:
    """Texts a second."""
    entries = results.extra.get("throughput", ())
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "classes": lambda entry: f"{entry['classes']:,}",
        "workers": lambda entry: str(entry["workers"]),
        "load": lambda entry: entry["load"],
        "offered /s": lambda entry: number(entry["offered_per_second"], ".0f"),
        "texts /s": lambda entry: number(entry["texts_per_second"], ".4g"),
        "per worker core": lambda entry: number(entry["texts_per_worker_core"], ".4g"),
        "2 : 1": lambda entry: number(entry["two_against_one"], ".2f"),
        "p50 ms": lambda entry: number(entry["p50_ms"], ".1f"),
        "p95 ms": lambda entry: number(entry["p95_ms"], ".1f"),
        "p99 ms": lambda entry: number(entry["p99_ms"], ".1f"),
        "cores: generator": lambda entry: number(entry["generator_cores"], ".2f"),
        "service": lambda entry: number(entry["service_cores"], ".2f"),
        "workers' cores": lambda entry: number(entry["worker_cores"], ".2f"),
        "max error": lambda entry: number(entry["max_error"], ".1e"),
    }
    return Table(
        "Throughput over HTTP, single queries",
        tuple(columns),
        tuple(tuple(cell(dict(entry)) for cell in columns.values()) for entry in entries),
    )


def memory_table(results: Results) -> Table:
    """What the service holds."""
    return Table(
        "Memory of the service",
        ("what", "parameters", "each", "by design", "all of them, at most", "bounded by"),
        tuple(
            (
                str(entry["what"]),
                str(entry["parameters"]),
                size(entry["bytes_each"]),
                size(entry["expected_bytes"]),
                size(entry["bound_bytes"]),
                str(entry["bounded_by"]),
            )
            for entry in results.extra.get("memory", ())
        ),
        "Resident memory, by process.",
    )


def fidelity_table(results: Results) -> Table:
    """Encrypted against plaintext answers of trained heads."""
    rows = [row for row in results.rows if row.subject.startswith("fidelity/")]
    return Table(
        "Fidelity on real texts",
        ("data set", "classes", "texts", "parameters", "max error", "labels and accuracy"),
        tuple(
            (
                row.subject.partition("/")[2],
                str(row.classes),
                str(row.batch),
                row.parameters,
                number(row.max_error, ".1e"),
                row.note,
            )
            for row in rows
        ),
        "Heads trained on samples: the accuracies are for comparison with each other only.",
    )


def attacks_table(results: Results) -> Table:
    """What attacks found: what is not as it should be, what is, and what nothing is said of."""
    order = (False, True, None)
    entries = sorted(
        results.extra.get("attacks", ()), key=lambda entry: order.index(entry["holds"])
    )
    broken = sum(entry["holds"] is False for entry in entries)
    promises = sum(entry["holds"] is not None for entry in entries)
    return Table(
        "Attacks",
        ("attack", "system", "target", "figure", "value", "chance", "over", "expected", "holds"),
        tuple(
            (
                *(str(entry[name]) for name in ("attack", "system", "target", "metric")),
                number(entry["value"], ".4g"),
                number(entry["chance"], ".4g"),
                f"{entry['samples']:,}",
                entry["expected"],
                {True: "yes", False: "no", None: ""}[entry["holds"]],
            )
            for entry in entries
        ),
        f"{promises - broken} of {promises} expectations hold. Without a protection, an attack is "
        "expected to succeed; `docs/privacy.md` says what each one is.",
    )


_TABLES: Final = (
    claims_table,
    single_table,
    batch_table,
    floor_table,
    primitives_table,
    end_to_end_table,
    throughput_table,
    memory_table,
    fidelity_table,
    attacks_table,
)


def tables(results: Results) -> list[Table]:
    """All tables that have rows."""
    made = (make(results) for make in _TABLES)
    return [table for table in made if table.rows]


def print_tables(console: Console, results: Results) -> None:
    """Print all tables."""
    for table in tables(results):
        table.print(console)


def to_markdown(results: Results) -> str:
    """The run as Markdown, for docs/benchmarks.md."""
    parts = [f"{describe(results)}\n", *(table.to_markdown() for table in tables(results))]
    return "\n".join(parts)


def describe(results: Results) -> str:
    """When and where the run took place, in one sentence; others that were joined to it too."""
    about = results.environment
    return " ".join(map(_describe, (about, *about.get("others", ()))))


def _describe(about: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in about.get("versions", {}).items())
    return (
        f"Measured on {str(about.get('date', 'an unknown day'))[:10]} on {about.get('cores', '?')} "
        f"cores of {about.get('processor', 'an unknown processor')}, Python "
        f"{about.get('python', '?')}, {versions}; load average before: "
        f"{number(about.get('load_average_before'), '.2f')}."
    )
