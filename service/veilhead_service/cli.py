"""`veilhead-server`: the vendor's command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from veilhead_protocol.errors import VeilheadError
from veilhead_service import access_log_cli, logs, settings_cli
from veilhead_service.doctor import doctor
from veilhead_service.settings_cli import Assignments, ConfigFile, from_flags

app = typer.Typer(
    name="veilhead-server",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=(
        "Train, publish and serve private text classifiers.\n\n"
        "`train` makes an artefact: a private head and a public manifest. `publish` puts it into a "
        "store, `run` serves the store. The service answers on ciphertexts only: it never sees a "
        "text, an embedding, a logit or a label."
    ),
)

app.add_typer(access_log_cli.app, name="access-log")
app.command("settings")(settings_cli.show)
app.command("doctor")(doctor)

_console = Console(stderr=True, highlight=False)


@contextmanager
def _reported() -> Iterator[None]:
    """Errors of ours as one line on standard error, and exit status 1."""
    try:
        yield
    except VeilheadError as error:
        _console.print(f"veilhead-server: {error}", markup=False)
        raise typer.Exit(1) from error
    except ModuleNotFoundError as error:
        _console.print(
            f"veilhead-server: this needs {error.name!r}: pip install 'veilhead[service,train]'",
            markup=False,
        )
        raise typer.Exit(1) from error


@app.command()
def train(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DATASET|FILE",
            help="icd10-chapters, cfpb or vader-movies, or a .csv, .jsonl or .ndjson file.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The artefact's directory; its name is the model's.")],
    text: Annotated[str | None, typer.Option(help="The file's column of texts.")] = None,
    label: Annotated[str | None, typer.Option(help="The file's column of labels.")] = None,
    backbone: Annotated[
        Path | None,
        typer.Option(help="Directory of a sentence transformer; MiniLM when it is absent."),
    ] = None,
    parameters: Annotated[
        str,
        typer.Option(help="compact (fast), or strong (for secrets that must last decades)."),
    ] = "compact",
    device: Annotated[str, typer.Option(help="auto, or a torch device.")] = "auto",
) -> None:
    """Train a linear head on frozen embeddings, and report how good it is on held-out rows.

    Example: veilhead-server train icd10-chapters --out artifacts/icd10-chapters
    """
    with _reported():
        for name in ("torch", "transformers", "sklearn"):
            if find_spec(name) is None:  # before anything is fetched
                raise ModuleNotFoundError(name=name)

        from veilhead_models.backbone import describe, minilm
        from veilhead_models.datasets import load_dataset
        from veilhead_models.training import train_artifact

        dataset = load_dataset(source, text=text, label=label)
        directory, section = minilm() if backbone is None else (backbone, describe(backbone))
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=_console, disable=not _console.is_terminal) as progress:
            task = progress.add_task("embedding", total=None)
            artifact, report = train_artifact(
                dataset,
                directory,
                section,
                parameters=parameters,
                device=device,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        manifest = artifact.save(out, report=report.to_json())
    typer.echo(report.render())
    typer.echo(f"{manifest.name}: {out} (digest {manifest.digest.hex()})")


@app.command()
def publish(
    directory: Annotated[Path, typer.Argument(help="An artefact that `train` made.")],
    store: Annotated[Path, typer.Option(help="The store that `run` serves.")],
) -> None:
    """Put an artefact into a store. A service that runs on the store notices by itself.

    Example: veilhead-server publish artifacts/icd10-chapters --store store
    """
    with _reported():
        from veilhead_service.model_store import publish as publish_artifact

        manifest = publish_artifact(directory, store)
    typer.echo(f"{manifest.name}: published in {store} (digest {manifest.digest.hex()})")


@app.command()
def run(
    store: Annotated[Path | None, typer.Option(help="The store to serve.")] = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="The port to listen on.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Evaluating processes; one a core when absent.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Where the service keeps what it writes.")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="json or text.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """Serve a store over HTTP until it is stopped.

    This version knows no tenants: keep it on loopback, or behind a proxy that authenticates and
    speaks TLS.

    Flags come before VEILHEAD_SERVER_* variables, these before the file; `veilhead-server
    settings` prints what is in force.

    Example: veilhead-server run --store store
    """
    with _reported():
        import uvicorn

        from veilhead_service.app import create_app

        settings, _ = from_flags(
            config,
            assignments,
            store=store,
            host=host,
            port=port,
            workers=workers,
            state_directory=state,
            log_format=log_format,
            log_level=log_level,
        )
        logs.configure(settings.log_format, settings.log_level)
        uvicorn.run(
            create_app(settings),
            host=settings.host,
            port=settings.port,
            access_log=False,
            log_config=None,  # `logs.configure` did it
        )
