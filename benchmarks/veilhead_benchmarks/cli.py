"""`veilhead-bench`: benchmarks and the demo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from veilhead_benchmarks.rows import Results

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
    full: Annotated[
        bool,
        typer.Option("--full", help="Sweeps, all data sets, and peers that are installed for it."),
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this subject; may be given several times.")
    ] = None,
) -> None:
    """Measure everything, against plaintext and against what else one would use."""
    from veilhead_benchmarks.runner import FULL, QUICK, run_benchmarks

    try:
        run_benchmarks(out, FULL if full else QUICK, only or ())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="A JSON file that `run` or `attack` wrote, or both, to be shown as one."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file; beside the first of the results.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as Markdown instead.")
    ] = False,
) -> None:
    """Show a run: plots and tables in one HTML file."""
    from veilhead_benchmarks.report import write_report
    from veilhead_benchmarks.rows import Results, ResultsError
    from veilhead_benchmarks.tables import to_markdown

    try:
        found = Results.joined([_read(Results.load, path) for path in results])
    except ResultsError as error:
        raise typer.BadParameter(str(error)) from None
    if markdown:
        typer.echo(to_markdown(found), nl=False)
        return
    target = results[0].with_suffix(".html") if out is None else out
    write_report(found, target)
    typer.echo(f"report in {target}")


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="The results to compare with.")],
    new: Annotated[Path, typer.Argument(help="The results to judge.")],
    threshold: Annotated[
        float, typer.Option(help="From how many times the time on it is a regression.")
    ] = 1.25,
) -> None:
    """Compare two runs. Exit status 1 when anything became slower, larger or less exact."""
    from veilhead_benchmarks.compare import compare as compared
    from veilhead_benchmarks.compare import print_comparison
    from veilhead_benchmarks.console import wide_console
    from veilhead_benchmarks.rows import Results

    try:
        found = compared(_read(Results.load, old), _read(Results.load, new), threshold)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    print_comparison(wide_console(), found)
    raise typer.Exit(1 if found.regressions else 0)


def _read(load: Callable[[Path], Results], path: Path) -> Results:
    """The results of a file; a file that holds none ends the command with status 2."""
    from veilhead_benchmarks.rows import ResultsError

    try:
        return load(path)
    except ResultsError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


@app.command()
def chaos(
    short: Annotated[bool, typer.Option("--short", help="A few seconds for each fault.")] = False,
) -> None:
    """Kill, starve and damage a running service under load, and watch what callers see.

    Exit status 1 when any call was wrong or lost, or any other promise was broken.
    """
    from veilhead_benchmarks.chaos import run_chaos

    outcomes = run_chaos(seconds=3.0 if short else 20.0)
    raise typer.Exit(0 if all(outcome.passed for outcome in outcomes) else 1)


@app.command()
def hostile(
    requests: Annotated[int, typer.Option(min=1, help="How many requests.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="What the requests follow from.")] = 1,
    only: Annotated[
        int | None, typer.Option(min=0, help="Send what this number stands for, alone.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file for a summary.")] = None,
) -> None:
    """Send hostile requests to a real service, over hostile connections, and judge every answer.

    Afterwards memory, open files and the disk must be as they were. Exit status 1 when any promise
    was broken; the seed and the request's number are printed.
    """
    from veilhead_benchmarks.hostile import run_hostile, show

    report = run_hostile(requests=requests, seed=seed, only=only)
    show(report, out)
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def soak(
    seconds: Annotated[
        float, typer.Option(min=1, help="How long to ask: half alone, half beside the abuser.")
    ] = 600.0,
    workers: Annotated[int, typer.Option(min=1, help="Evaluating processes.")] = 2,
    tenants: Annotated[int, typer.Option(min=2, help="Tenants, one of them abusive.")] = 8,
    clients: Annotated[int, typer.Option(min=1, help="Clients of each tenant.")] = 8,
    abuser_connections: Annotated[
        int, typer.Option(min=1, help="Connections of the abusive tenant, about.")
    ] = 128,
    out: Annotated[Path, typer.Option(help="The JSON file of the results.")] = Path(
        "benchmarks/results/soak.json"
    ),
) -> None:
    """Let many clients ask for a long time, alone and then beside an abusive tenant.

    Judges every answer, the others' waiting, memory and open files. Exit status 1 when a promise
    was broken.
    """
    from veilhead_benchmarks.soak import run_soak, show

    report = run_soak(
        seconds=seconds,
        workers=workers,
        tenants=tenants,
        clients=clients,
        abuser_connections=abuser_connections,
    )
    show(report, out)
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def fairness(
    seconds: Annotated[float, typer.Option(min=1, help="How long each row asks.")] = 20.0,
    workers: Annotated[int, typer.Option(min=1, help="Evaluating processes.")] = 2,
    out: Annotated[Path, typer.Option(help="The JSON file of the results.")] = Path(
        "benchmarks/results/fairness.json"
    ),
) -> None:
    """Measure how long a light tenant's query takes beside a heavy tenant, polite and impolite.

    Exit status 1 when one of its queries was not answered, or any answer was wrong.
    """
    from veilhead_benchmarks.fairness import run_fairness, show

    rows = run_fairness(seconds=seconds, workers=workers)
    show(rows, out)
    raise typer.Exit(0 if all(row.passed for row in rows) else 1)


@app.command()
def deidentify(
    records: Annotated[int, typer.Option(min=1, help="Generated records.")] = 20_000,
    dataset: Annotated[str, typer.Option(help="The data set of the accuracies.")] = "cfpb",
    train_rows: Annotated[int, typer.Option(min=1, help="Texts to train on.")] = 2_000,
    test_rows: Annotated[int, typer.Option(min=1, help="Texts to judge by.")] = 1_000,
    out: Annotated[Path, typer.Option(help="The JSON file of the results.")] = Path(
        "benchmarks/results/deidentify.json"
    ),
) -> None:
    """Measure what de-identification finds, and what it costs a classifier in accuracy."""
    from veilhead_benchmarks.deidentify import run_deidentify

    run_deidentify(
        count=records, dataset=dataset, train_rows=train_rows, test_rows=test_rows, out=out
    )


@app.command("records")
def generated_records(
    out: Annotated[Path, typer.Argument(help="The .jsonl file to write.")],
    count: Annotated[int, typer.Option(min=1, help="How many records.")] = 5_000,
    seed: Annotated[int, typer.Option(help="What the records follow from.")] = 1,
) -> None:
    """Write generated records with marked values, which a token head can be trained on.

    Example: veilhead-bench records pii.jsonl; veilhead-server train pii.jsonl --task
    token-classification --out artifacts/pii
    """
    from veilhead_benchmarks.pii_tags import tagged_records
    from veilhead_models.records import write_records

    write_records(out, tagged_records(count, seed))
    typer.echo(f"{count} records in {out}")


@app.command("pii-tags")
def pii_tags(
    train: Annotated[int, typer.Option(min=1, help="Records to train on.")] = 3_000,
    test: Annotated[int, typer.Option(min=1, help="Records to judge by, of each kind.")] = 300,
    runs: Annotated[int, typer.Option(min=1, help="Private runs for each epsilon.")] = 3,
    out: Annotated[Path, typer.Option(help="The JSON file of the results.")] = Path(
        "benchmarks/results/pii-tags.json"
    ),
) -> None:
    """Measure what token heads find of values in records, trained privately and not."""
    from veilhead_benchmarks.pii_tags import run_pii_tags

    run_pii_tags(train=train, test=test, runs=runs, out=out)


@app.command()
def attack(
    name: Annotated[str | None, typer.Argument(help="One attack; all when it is absent.")] = None,
    short: Annotated[bool, typer.Option("--short", help="Fewer rows and heads.")] = False,
    out: Annotated[Path, typer.Option(help="The JSON file of the results.")] = Path(
        "benchmarks/results/attacks.json"
    ),
) -> None:
    """Attack heads, embeddings and queries: what they give away, with and without protection.

    Exit status 1 when a protection did not hold, or an attack failed where it ought to succeed.
    """
    from veilhead_benchmarks.attacks.runner import ATTACKS, run_attacks

    if name is not None and name not in ATTACKS:
        raise typer.BadParameter(f"no such attack; there are {', '.join(ATTACKS)}")
    raise typer.Exit(0 if run_attacks(name, short=short, out=out) else 1)


@app.command("light-client")
def light_client(
    out: Annotated[Path, typer.Option(help="The JSON file of the results.")] = Path(
        "benchmarks/results/light-client.json"
    ),
) -> None:
    """Install veilhead[onnx] into an environment of its own: its size, and seconds to a label.

    Builds a wheel of this source tree and installs it by pip. Exit status 1 when the environment
    holds torch or the like, or a label was wrong.
    """
    from veilhead_benchmarks.light_client import run_light_client, show

    report = run_light_client()
    show(report, out)
    raise typer.Exit(0 if report.passed else 1)
