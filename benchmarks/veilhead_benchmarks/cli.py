"""`veilhead-bench`: benchmarks and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="veilhead-bench",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure Veilhead, against plaintext and against what else one would use.",
)


@app.command()
def demo(
    work: Annotated[
        Path, typer.Option(help="Where the demo's artefact and store are written.")
    ] = Path(),
) -> None:
    """Train on real medical phrases, serve, and classify the held-out split over HTTP.

    Writes demo-report.json. Exit status 1 when an encrypted answer differs from the plaintext one.
    """
    from veilhead_benchmarks.demo import run_demo

    raise typer.Exit(0 if run_demo(work) else 1)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="The JSON file of the results.")] = Path(
        "benchmarks/results/latest.json"
    ),
) -> None:
    """Measure single queries against TenSEAL's own matrix product, in one run."""
    from veilhead_benchmarks.runner import run_benchmarks

    run_benchmarks(out)
