"""One HTML file of a run: plots and tables, nothing fetched from elsewhere."""

from __future__ import annotations

import io
import re
from base64 import b64encode
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final

from veilhead_benchmarks.attack_plots import attack_plots
from veilhead_benchmarks.plots import plots
from veilhead_benchmarks.rows import Results
from veilhead_benchmarks.tables import CLAIMS, Table, describe, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em;
       color: #222; background: #fff; }
h1, h2 { line-height: 1.2; }
figure { margin: 1em 0 2em; }
figure img { max-width: 100%; height: auto; }
figcaption { color: #555; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25em 0.7em; text-align: left; }
th { border-bottom-color: #888; }
td.no { color: #b00020; font-weight: bold; }
"""


def write_report(results: Results, path: Path) -> None:
    """Write the report of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_html(results), "utf-8")


def to_html(results: Results) -> str:
    """The report's text."""
    made = tables(results)
    first = [table for table in made if table.title == CLAIMS]
    others = [table for table in made if table.title != CLAIMS]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Veilhead benchmarks</title><style>{_STYLE}</style></head><body>",
        "<h1>Veilhead benchmarks</h1>",
        f"<p>{escape(describe(results))} Compare within this run only.</p>",
        *(f"<p>Left out: {escape(why)}</p>" for why in results.environment.get("left_out", ())),
        *map(_table, first),
    ]
    for plot in (*plots(results), *attack_plots(results)):
        alternative = escape(f"{plot.title}. {plot.text}".replace("`", ""), quote=True)
        parts += [
            f"<h2>{escape(plot.title)}</h2>",
            f'<figure><img alt="{alternative}" src="{_data_url(plot.figure)}">',
            f"<figcaption>{_prose(plot.text)}</figcaption></figure>",
        ]
    parts += [*map(_table, others), "</body></html>", ""]
    return "\n".join(parts)


def _data_url(figure: Figure) -> str:
    """The figure as an image inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + b64encode(buffer.getvalue()).decode()


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table.rows)
    note = f"<p>{_prose(table.note)}</p>" if table.note else ""
    return (
        f"<h2>{escape(table.title)}</h2>{note}"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _prose(text: str) -> str:
    """A sentence, with names in code as Markdown has them."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _cell(text: str) -> str:
    return f"<td{' class=no' if text == 'no' else ''}>{escape(text)}</td>"
