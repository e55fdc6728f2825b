"""`veilhead`: the data owner's command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from veilhead.api_key import read_api_key_file
from veilhead.async_client import AsyncClient
from veilhead.client import Client
from veilhead.doctor import examine
from veilhead.evaluation import evaluate as score_answers
from veilhead.predictions import Prediction, Shape
from veilhead.runs import json_line, opened_run
from veilhead.tables import TableFile
from veilhead_protocol.checks import healthy, render
from veilhead_protocol.errors import (
    ClientError,
    InputError,
    NotSentError,
    ServiceResponseError,
    TransportError,
    VeilheadError,
)
from veilhead_protocol.files import sha256_of

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

_errors = Console(stderr=True)

_Url = Annotated[str, typer.Option(help="The service: https://..., or http:// on this machine.")]
_Model = Annotated[str, typer.Option(help="The model's name at the service.")]
_File = Annotated[
    Path | None, typer.Option(help="A .csv, .jsonl or .parquet file instead of TEXT arguments.")
]
_Backbone = Annotated[
    Path | None,
    typer.Option(help="Directory of the backbone's files, instead of fetching them once."),
]
_Device = Annotated[str, typer.Option(help="auto (CUDA, then MPS, then CPU) or a torch device.")]
_Minimum = Annotated[
    str, typer.Option(help="The weakest parameter set to accept: standard or compact.")
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
_Deidentify = Annotated[
    bool | None,
    typer.Option(
        "--deidentify/--no-deidentify",
        help="Replace e-mail addresses, account numbers and the like before a text is embedded; "
        "by default, as the model's policy says.",
    ),
]
_Timeout = Annotated[
    float, typer.Option(help="Seconds that each attempt of a request may take, of five.")
]
_CallTimeout = Annotated[
    float | None,
    typer.Option(
        help="Seconds that the service may take with each chunk of texts, attempts and pauses "
        "together; after that the command stops, and keeps what was answered."
    ),
]
_EmbedFirst = Annotated[
    bool,
    typer.Option(
        "--embed-first",
        help="Embed all texts of a chunk before any is sent: the gaps between its requests then "
        "tell nothing of their lengths.",
    ),
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
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl or .csv file for the answers to --file; the same command again goes on "
            "where a killed one stopped."
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Labels for each text, best first.")] = 1,
    function_to_apply: Annotated[
        str | None,
        typer.Option(help="Scores by softmax, sigmoid or none (logits); else the model's own."),
    ] = None,
    deidentify: _Deidentify = None,
    embed_first: _EmbedFirst = False,
    as_json: _Json = False,
    backbone: _Backbone = None,
    device: _Device = "auto",
    minimum_parameters: _Minimum = "standard",
    digest: _Digest = None,
    vendor_key: _VendorKey = None,
    api_key_file: _ApiKeyFile = None,
    timeout: _Timeout = 30.0,
    call_timeout: _CallTimeout = None,
) -> None:
    """Classify texts, files or standard input.

    Example: veilhead classify --url http://127.0.0.1:8000 --model icd10-chapters "chest pain"

    One line a text: the labels with their scores. With --json one JSON object a text, with its
    row number and either predictions or the error. Exit status 1 when any text failed, although
    the others' answers are kept, and when the service could not answer, which stops the run.
    """
    with _reported():
        table = _table(texts, file, column, out)
        with _opened(
            url,
            model,
            backbone,
            device,
            minimum_parameters,
            digest,
            vendor_key,
            api_key_file,
            deidentify,
            timeout,
            call_timeout,
            embed_first,
        ) as client:
            shape = Shape.of(client.manifest.head, top_k, function_to_apply)
            if table is None or out is None:
                rows = _lines(texts) if table is None else table
                failed = _print_rows(_answers(client, rows, shape), as_json)
            else:
                failed = _write_rows(client, table, shape, out)
    raise typer.Exit(1 if failed else 0)


@app.command()
def evaluate(
    url: _Url,
    model: _Model,
    file: Annotated[Path, typer.Option(help="A .csv, .jsonl or .parquet file.")],
    text: Annotated[str, typer.Option(help="Its column of texts.")],
    label: Annotated[str, typer.Option(help="Its column of true labels, which stay here.")],
    deidentify: _Deidentify = None,
    embed_first: _EmbedFirst = False,
    as_json: _Json = False,
    backbone: _Backbone = None,
    device: _Device = "auto",
    minimum_parameters: _Minimum = "standard",
    digest: _Digest = None,
    vendor_key: _VendorKey = None,
    api_key_file: _ApiKeyFile = None,
    timeout: _Timeout = 30.0,
    call_timeout: _CallTimeout = None,
) -> None:
    """Measure a model on your own labelled texts, over the encrypted path.

    Prints accuracy, and precision, recall, F1 and count of every label. Neither the texts nor the
    labels leave this machine. Exit status 1 when any text failed.
    """
    with _reported():
        labelled = TableFile.open(file, [text, label])
        labels = [name for _, name in labelled.values()]
        with _opened(
            url,
            model,
            backbone,
            device,
            minimum_parameters,
            digest,
            vendor_key,
            api_key_file,
            deidentify,
            timeout,
            call_timeout,
            embed_first,
        ) as client:
            shape = Shape.of(client.manifest.head, 1, None)
            rows = list(_answers(client, labelled, shape))
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
def card(
    url: _Url,
    model: _Model,
    digest: _Digest = None,
    vendor_key: _VendorKey = None,
    api_key_file: _ApiKeyFile = None,
) -> None:
    """Print a model's card: data, quality, privacy, attacks, encryption, limits.

    With --vendor-key a card that this key did not sign, for this very version, is refused.

    Example: veilhead card --url http://127.0.0.1:8000 --model icd10-chapters
    """
    with (
        _reported(),
        _opened(
            url, model, None, "auto", "compact", digest, vendor_key, api_key_file, deidentify=False
        ) as client,
    ):
        text = client.card()
        signed = "signed by" if vendor_key else "not checked against"
        typer.echo(
            f"{model}, version {client.manifest.digest.hex()}: {signed} a vendor key", err=True
        )
    # A card may come from anybody: nothing of it drives the terminal.
    lines = (
        "".join(letter if letter.isprintable() else "?" for letter in line)
        for line in text.split("\n")
    )
    typer.echo("\n".join(lines), nl=False)


@app.command()
def gateway(
    upstream: Annotated[
        str, typer.Option(help="The vendor's service: https://..., or http:// on this machine.")
    ],
    model: _Model,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 8080,
    callers: Annotated[
        Path | None,
        typer.Option(help="File with the callers' tokens, one a line, yours alone (mode 600)."),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Texts that are embedded together.")] = 32,
    max_wait_ms: Annotated[float, typer.Option(help="How long a text waits for others.")] = 5.0,
    max_waiting: Annotated[
        int, typer.Option(help="Texts that may wait; more are refused with 429.")
    ] = 2048,
    max_texts: Annotated[int, typer.Option(help="Texts in one request.")] = 256,
    max_body_bytes: Annotated[int, typer.Option(help="Bytes of one request.")] = 2 * 2**20,
    max_connections: Annotated[
        int, typer.Option(help="Connections at once; more are closed.")
    ] = 256,
    request_seconds: Annotated[
        float, typer.Option(help="A request that takes longer in all gets 504.")
    ] = 60.0,
    timeout: _Timeout = 30.0,
    call_timeout: Annotated[
        float, typer.Option(help="Seconds that the vendor's service may take with each batch.")
    ] = 60.0,
    deidentify: _Deidentify = None,
    backbone: _Backbone = None,
    device: _Device = "auto",
    minimum_parameters: _Minimum = "standard",
    digest: _Digest = None,
    vendor_key: _VendorKey = None,
    api_key_file: _ApiKeyFile = None,
) -> None:
    """Answer plaintext requests inside your own perimeter, and ask the vendor encrypted.

    POST /predict takes and gives what text-embeddings-inference does. This process sees every text:
    run it where the texts may be. Beyond loopback it needs --callers, and a proxy that speaks TLS.

    Example: veilhead gateway --upstream https://vendor.example --model icd10-chapters
    """
    with _reported():
        try:
            from veilhead.gateway.app import Gateway, Limits
            from veilhead.gateway.callers import Callers
            from veilhead.gateway.logs import configure
            from veilhead.gateway.metrics import Metrics
            from veilhead.gateway.server import serve
        except ModuleNotFoundError as error:
            raise ClientError(
                f"the gateway needs {error.name!r}: pip install 'veilhead[gateway]'"
            ) from error
        configure()
        metrics = Metrics()
        client = AsyncClient(
            upstream,
            model,
            backbone=backbone,
            device=device,
            digest=digest,
            minimum_parameters=minimum_parameters,
            vendor_key=_vendor_keys(vendor_key),
            api_key=None if api_key_file is None else read_api_key_file(api_key_file),
            deidentify=deidentify,
            fresh_keys=True,
            embed_first=True,
            concurrency=max_batch,
            timeout=timeout,
            call_timeout=call_timeout,
            on_query=metrics.queried,
        )
        limits = Limits(
            max_batch=max_batch,
            max_wait_seconds=max_wait_ms / 1e3,
            max_waiting=max_waiting,
            max_texts=max_texts,
            max_body_bytes=max_body_bytes,
            max_connections=max_connections,
            request_seconds=request_seconds,
        )
        known = None if callers is None else Callers.read(callers)
        serve(Gateway(client, known, limits, metrics), host, port)


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
    deidentify: bool | None,
    timeout: float = 30.0,
    call_timeout: float | None = None,
    embed_first: bool = False,
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
        deidentify=deidentify,
        timeout=timeout,
        call_timeout=call_timeout,
        embed_first=embed_first,
        on_download=announce,
    ) as client:
        if deidentify is None and client.deidentifier is not None:
            typer.echo("texts are de-identified, as the model's policy asks", err=True)
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


def _table(
    texts: Sequence[str] | None, file: Path | None, column: str | None, out: Path | None
) -> TableFile | None:
    """The table of --file and --column, when there is one."""
    if file is None:
        if out is not None:
            raise InputError("--out needs --file: what comes from elsewhere cannot be continued")
        return None
    if texts:
        raise InputError("give TEXT arguments or --file, not both")
    if column is None:
        raise InputError("--file needs --column, the name of the column of texts")
    return TableFile.open(file, [column])


def _lines(texts: Sequence[str] | None) -> Sequence[str] | TextIO:
    if texts:
        return texts
    if sys.stdin.isatty():
        raise InputError("nothing to classify: give TEXT arguments, --file, or standard input")
    return sys.stdin


def _answers(
    client: Client, texts: TableFile | Sequence[str] | TextIO, shape: Shape, start: int = 0
) -> Iterator[list[Prediction] | VeilheadError]:
    """Predictions or the error of each text from row `start`, with a bar on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    rows: Iterable[Any]
    if isinstance(texts, TableFile):
        total: int | None = texts.rows
        rows = (values[0] for values in texts.values(start))
    elif isinstance(texts, Sequence):
        total, rows = len(texts), texts
    else:
        total, rows = None, (line.rstrip("\n") for line in texts)
    with Progress(*columns, console=_errors, disable=not _errors.is_terminal) as progress:
        task = progress.add_task("classifying", total=total, completed=start)
        yield from client.classify_many(
            rows,
            top_k=shape.top_k,
            function_to_apply=shape.function,
            progress=partial(progress.advance, task),
            start=start,
        )


def _answered(
    answers: Iterable[list[Prediction] | VeilheadError],
) -> Iterator[list[Prediction] | VeilheadError]:
    """The answers, until one shows that the service gives no more.

    Raises:
        VeilheadError: that one.
    """
    for answer in answers:
        if isinstance(answer, NotSentError | TransportError | ServiceResponseError):
            raise answer
        yield answer


def _write_rows(client: Client, table: TableFile, shape: Shape, out: Path) -> int:
    """Answer the rows of a table that `out` does not answer yet; how many failed in all."""
    identity = {
        "model": client.manifest.name,
        "digest": client.manifest.digest.hex(),
        "input": sha256_of(table.path),
        "column": table.columns[0],
        "top_k": shape.top_k,
        "function_to_apply": shape.function,
        "deidentify": client.deidentifier is not None,
    }
    with opened_run(out, shape, identity) as run:
        try:
            for answer in _answered(_answers(client, table, shape, run.rows)):
                run.write(answer)
        except VeilheadError:
            typer.echo(
                f"{out} holds {run.rows} of {table.rows} rows: the same command goes on from there",
                err=True,
            )
            raise
        if run.failed:
            typer.echo(f"{run.failed} of {run.rows} rows failed: {out} says why", err=True)
        return run.failed


def _print_rows(answers: Iterable[list[Prediction] | VeilheadError], as_json: bool) -> int:
    """Print a line for each text; how many failed."""
    failed = 0
    for number, answer in enumerate(_answered(answers)):
        failed += isinstance(answer, VeilheadError)
        if as_json:
            typer.echo(json_line(number, answer))
        elif isinstance(answer, VeilheadError):
            typer.echo("")  # one line a text, so that lines and texts stay side by side
            typer.echo(str(answer), err=True)
        else:
            typer.echo("\t".join(f"{item.score:.4f} {item.label}" for item in answer))
    return failed
