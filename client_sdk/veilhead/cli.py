"""`veilhead`: the data owner's command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from veilhead.api_key import read_api_key_file
from veilhead.client import Client
from veilhead.doctor import examine
from veilhead.evaluation import evaluate as score_answers
from veilhead.predictions import Prediction
from veilhead.tables import read_columns
from veilhead_protocol.checks import healthy, render
from veilhead_protocol.errors import BatchError, InputError, VeilheadError

app = typer.Typer(
    name="veilhead",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=(
        "Classify text with somebody else's model, without showing them the text.\n\n"
        "The public backbone runs on this machine; what goes out is an encrypted embedding, and "
        "what comes back only this process can decrypt."
    ),
)

#: Texts between two steps of the progress bar.
_STEP = 256

_errors = Console(stderr=True)

_Url = Annotated[str, typer.Option(help="The service: https://..., or http:// on this machine.")]
_Model = Annotated[str, typer.Option(help="The model's name at the service.")]
_File = Annotated[
    Path | None, typer.Option(help="A .csv, .jsonl or .ndjson file instead of TEXT arguments.")
]
_Backbone = Annotated[
    Path | None,
    typer.Option(help="Directory of the backbone's files, instead of fetching them once."),
]
_Device = Annotated[str, typer.Option(help="auto (CUDA, then MPS, then CPU) or a torch device.")]
_Minimum = Annotated[
    str, typer.Option(help="The weakest parameter set to accept: compact or strong.")
]
_Digest = Annotated[
    str | None, typer.Option(help="The model version to accept, 64 hexadecimal digits.")
]
_VendorKey = Annotated[
    list[str] | None,
    typer.Option(
        help="Accept only manifests signed by this key: ed25519:..., or @FILE with one a line. "
        "May be repeated."
    ),
]
_ApiKeyFile = Annotated[
    Path | None,
    typer.Option(help="File with the vendor's API key, yours alone; else VEILHEAD_API_KEY."),
]
_Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]


@app.callback()
def _root() -> None:
    """Keep `veilhead` a command with subcommands."""


@app.command()
def classify(
    url: _Url,
    model: _Model,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT]...", help="Texts; standard input, line by line, if none."),
    ] = None,
    file: _File = None,
    column: Annotated[str | None, typer.Option(help="The file's column of texts.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Labels for each text, best first.")] = 1,
    as_json: _Json = False,
    backbone: _Backbone = None,
    device: _Device = "auto",
    minimum_parameters: _Minimum = "compact",
    digest: _Digest = None,
    vendor_key: _VendorKey = None,
    api_key_file: _ApiKeyFile = None,
) -> None:
    """Classify texts, files or standard input.

    Example: veilhead classify --url http://127.0.0.1:8000 --model icd10-chapters "chest pain"

    One line a text: the labels with their scores. With --json one JSON object a text, with its
    row number and either predictions or the error. Exit status 1 when any text failed.
    """
    with _reported():
        rows = _texts(texts, file, column)
        with _opened(
            url, model, backbone, device, minimum_parameters, digest, vendor_key, api_key_file
        ) as client:
            failed = False
            for number, row in enumerate(_answers(client, rows, top_k)):
                failed |= isinstance(row, VeilheadError)
                _print_row(number, row, as_json)
    raise typer.Exit(1 if failed else 0)


@app.command()
def evaluate(
    url: _Url,
    model: _Model,
    file: Annotated[Path, typer.Option(help="A .csv, .jsonl or .ndjson file.")],
    text: Annotated[str, typer.Option(help="Its column of texts.")],
    label: Annotated[str, typer.Option(help="Its column of true labels, which stay here.")],
    as_json: _Json = False,
    backbone: _Backbone = None,
    device: _Device = "auto",
    minimum_parameters: _Minimum = "compact",
    digest: _Digest = None,
    vendor_key: _VendorKey = None,
    api_key_file: _ApiKeyFile = None,
) -> None:
    """Measure a model on your own labelled texts, over the encrypted path.

    Prints accuracy, and precision, recall, F1 and count of every label. Neither the texts nor the
    labels leave this machine. Exit status 1 when any text failed.
    """
    with _reported():
        texts, labels = read_columns(file, [text, label])
        with _opened(
            url, model, backbone, device, minimum_parameters, digest, vendor_key, api_key_file
        ) as client:
            rows = list(_answers(client, texts, 1))
            unknown = {str(name) for name in labels} - set(client.labels)
        answers = [None if isinstance(row, VeilheadError) else row[0].label for row in rows]
        scores = score_answers([str(name) for name in labels], answers)
        if unknown:
            _errors.print(
                f"{len(unknown)} of the file's labels are not among the model's: "
                "their texts count as wrong",
                markup=False,
            )
    if as_json:
        typer.echo(json.dumps(asdict(scores)))
    else:
        table = Table("label", "precision", "recall", "F1", "texts", box=None)
        for item in scores.labels:
            numbers = (f"{value:.3f}" for value in (item.precision, item.recall, item.f1))
            table.add_row(item.label, *numbers, str(item.support))
        console = Console(markup=False)
        console.print(table)
        console.print(
            f"accuracy {scores.accuracy:.4f} over {scores.answered} texts, {scores.failed} failed"
        )
    raise typer.Exit(1 if scores.failed else 0)


@app.command()
def doctor(
    url: Annotated[str | None, typer.Option(help="A service to reach.")] = None,
    model: Annotated[str | None, typer.Option(help="One of its models.")] = None,
    api_key_file: _ApiKeyFile = None,
    as_json: _Json = False,
) -> None:
    """Check this machine, and whether a service can be reached and understood.

    A line for each check: ok, warn or fail, with what to do about it. No text is sent, nothing is
    encrypted but constants, and the API key is not shown. Exit status 1 when a check fails.

    Example: veilhead doctor --url http://127.0.0.1:8000 --model icd10-chapters
    """
    checks = examine(url, model, api_key_file=api_key_file)
    typer.echo(render(checks, as_json=as_json))
    raise typer.Exit(0 if healthy(checks) else 1)


@contextmanager
def _reported() -> Iterator[None]:
    """Errors of ours as one line on standard error, and exit status 1."""
    try:
        yield
    except (VeilheadError, ValueError) as error:
        typer.echo(f"veilhead: {error}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def _opened(
    url: str,
    model: str,
    backbone: Path | None,
    device: str,
    minimum_parameters: str,
    digest: str | None,
    vendor_key: list[str] | None,
    api_key_file: Path | None,
) -> Iterator[Client]:
    def announce(path: str, size: int) -> None:
        if _errors.is_terminal:
            _errors.print(f"fetching {path} ({size / 1e6:.1f} MB)", markup=False)

    with Client(
        url,
        model,
        backbone=backbone,
        device=device,
        minimum_parameters=minimum_parameters,
        digest=digest,
        vendor_key=_vendor_keys(vendor_key),
        api_key=None if api_key_file is None else read_api_key_file(api_key_file),
        on_download=announce,
    ) as client:
        yield client


def _vendor_keys(given: list[str] | None) -> list[str] | None:
    """The keys of --vendor-key, those of files among them."""
    if not given:
        return None
    keys: list[str] = []
    for item in given:
        if not item.startswith("@"):
            keys.append(item)
            continue
        try:
            lines = Path(item[1:]).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the vendor key file {item[1:]} cannot be read") from error
        keys += [line for line in lines if line.strip() and not line.startswith("#")]
    return keys


def _texts(texts: Sequence[str] | None, file: Path | None, column: str | None) -> list[Any]:
    if file is not None:
        if texts:
            raise InputError("give TEXT arguments or --file, not both")
        if column is None:
            raise InputError("--file needs --column, the name of the column of texts")
        return read_columns(file, [column])[0]
    if texts:
        return list(texts)
    if sys.stdin.isatty():
        raise InputError("nothing to classify: give TEXT arguments, --file, or standard input")
    return [line.rstrip("\n") for line in sys.stdin]


def _answers(
    client: Client, texts: Sequence[Any], top_k: int
) -> Iterator[list[Prediction] | VeilheadError]:
    """Predictions or the error of each text, in order, with a bar on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_errors, disable=not _errors.is_terminal) as progress:
        task = progress.add_task("classifying", total=len(texts))
        for start in range(0, len(texts), _STEP):
            step = texts[start : start + _STEP]
            try:
                yield from client.classify(step, top_k=top_k)
            except BatchError as error:
                for index, row in enumerate(error.results):
                    yield error.errors.get(index, row)
            progress.advance(task, len(step))


def _print_row(number: int, row: list[Prediction] | VeilheadError, as_json: bool) -> None:
    if isinstance(row, VeilheadError):
        if as_json:
            problem = {"code": row.code, "message": str(row)}
            typer.echo(json.dumps({"row": number, "error": problem}))
        else:
            typer.echo("")  # one line a text, so that lines and texts stay side by side
            typer.echo(f"row {number}: {row}", err=True)
    elif as_json:
        found = [asdict(prediction) for prediction in row]
        typer.echo(json.dumps({"row": number, "predictions": found}, ensure_ascii=False))
    else:
        typer.echo("\t".join(f"{item.score:.4f} {item.label}" for item in row))
