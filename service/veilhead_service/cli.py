"""`veilhead-server`: the vendor's command."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from veilhead_protocol.errors import StoreError
from veilhead_protocol.policy import GUARDS, PRESETS, PolicySection, preset_policy
from veilhead_service import access_log_cli, card_cli, logs, models_cli, settings_cli
from veilhead_service.doctor import doctor
from veilhead_service.head_encryption import HeadKey
from veilhead_service.reporting import reported
from veilhead_service.settings_cli import Assignments, ConfigFile, from_flags
from veilhead_service.tenants_cli import app as tenants_app

app = typer.Typer(
    name="veilhead-server",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=(
        "Train, publish and serve private text classifiers.\n\n"
        "`train` and `import-hf` make an artefact: a private head and a public manifest. `publish` "
        "puts it into a store, `run` serves the store. The service answers on ciphertexts only: it "
        "never sees a text, an embedding, a logit or a label."
    ),
)

app.add_typer(models_cli.models_app, name="models")
app.add_typer(models_cli.signing_key_app, name="signing-key")
app.add_typer(models_cli.head_key_app, name="head-key")
app.command("retire")(models_cli.retire_model)
app.add_typer(tenants_app)
app.add_typer(access_log_cli.app, name="access-log")
app.command("settings")(settings_cli.show)
app.command("card")(card_cli.card)
app.command("doctor")(doctor)

_console = Console(stderr=True, highlight=False)
_logger = logging.getLogger("veilhead.service")


_PolicyName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help=f"Hold the model to a policy: {', '.join(PRESETS)}."),
]


def _policy(name: str | None) -> PolicySection | None:
    try:
        return None if name is None else preset_policy(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _policy_lines(policy: PolicySection) -> list[str]:
    """What a named policy asks for, and who sees to each clause."""
    if policy.preset is None:
        return []
    stated = policy.model_dump(mode="json", exclude={"preset"})
    return [
        f"policy {policy.preset}: {clause} {json.dumps(value)}: {GUARDS[clause].value}"
        for clause, value in stated.items()
    ]


@app.command()
def train(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DATASET|FILE",
            help="A data set by name (icd10-chapters, say), or a .csv, .jsonl or .ndjson file.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The artefact's directory; its name is the model's.")],
    task: Annotated[
        Literal["text-classification", "token-classification"],
        typer.Option(
            help="What gets a label: a text; or its tokens, for a .jsonl file of records with "
            "marked entities (docs/models.md)."
        ),
    ] = "text-classification",
    text: Annotated[str | None, typer.Option(help="The file's column of texts.")] = None,
    label: Annotated[str | None, typer.Option(help="The file's column of labels.")] = None,
    backbone: Annotated[
        Path | None,
        typer.Option(help="Directory of an encoder, or of an artefact; MiniLM when absent."),
    ] = None,
    parameters: Annotated[
        str,
        typer.Option(help="standard, or compact (half the bytes, a thinner margin)."),
    ] = "standard",
    policy: _PolicyName = None,
    device: Annotated[str, typer.Option(help="auto, or a torch device.")] = "auto",
    dp_epsilon: Annotated[
        float | None,
        typer.Option(help="Train with differential privacy, at most so much loss; 1 to 4 is good."),
    ] = None,
    dp_delta: Annotated[
        float | None, typer.Option(help="Its delta, 1e-5 when absent; below 1 by number of rows.")
    ] = None,
    insecure_large_epsilon: Annotated[
        bool,
        typer.Option("--insecure-large-epsilon", help="Allow an epsilon that protects nobody."),
    ] = False,
) -> None:
    """Train a linear head on frozen embeddings, and report how good it is on held-out rows.

    For token classification the rows are records, and the report counts entities.

    With --dp-epsilon, what is published tells little of any one row it was trained on; the
    manifest says how little (docs/privacy.md).

    Example: veilhead-server train icd10-chapters --out artifacts/icd10-chapters
    """
    with reported():
        of_tokens = task == "token-classification"
        packages = ["torch", "transformers", "sklearn", *(["nervaluate"] if of_tokens else [])]
        if dp_epsilon is not None:
            packages += ["dp_accounting", "opendp"]
        for name in packages:
            if find_spec(name) is None:  # before anything is fetched
                raise ModuleNotFoundError(name=name)

        from veilhead_models.backbone import minilm, open_backbone
        from veilhead_models.datasets import load_dataset
        from veilhead_models.privacy import DEFAULT_DELTA, PrivacyBudget
        from veilhead_models.records import load_records
        from veilhead_models.tagging import train_tagger_artifact
        from veilhead_models.training import train_artifact
        from veilhead_protocol.errors import DatasetError, PrivacyError

        asked = _policy(policy)
        if dp_epsilon is not None:
            delta = DEFAULT_DELTA if dp_delta is None else dp_delta
            privacy = PrivacyBudget(dp_epsilon, delta, insecure_large_epsilon)
        elif dp_delta is not None or insecure_large_epsilon:
            raise PrivacyError("--dp-delta and --insecure-large-epsilon need --dp-epsilon")
        else:
            privacy = None
        if of_tokens:
            if text is not None or label is not None:
                raise DatasetError("--text and --label are for tables; records have no columns")
            training: Callable[..., Any] = partial(train_tagger_artifact, load_records(source))
        else:
            training = partial(train_artifact, load_dataset(source, text=text, label=label))
        directory, section = minilm() if backbone is None else open_backbone(backbone)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=_console, disable=not _console.is_terminal) as progress:
            bar = progress.add_task("embedding", total=None)
            artifact, report = training(
                directory,
                section,
                parameters=parameters,
                policy=asked,
                device=device,
                privacy=privacy,
                progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )
        manifest = artifact.save(out, report=report.to_json())
    typer.echo(report.render())
    if privacy is not None:
        typer.echo(
            f"differentially private: epsilon {privacy.epsilon:g}, delta {privacy.delta:g}, "
            f"{manifest.about['privacy']['unit']} more or less; the report above is not, keep it"
        )
    typer.echo(f"{manifest.name}: {out} (digest {manifest.digest.hex()})")


@app.command("import-hf")
def import_hf(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="Directory of a transformers checkpoint that classifies texts or tokens.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The artefact's directory; its name is the model's.")],
    name: Annotated[str | None, typer.Option(help="Another name for the model.")] = None,
    parameters: Annotated[
        str,
        typer.Option(help="standard, or compact (half the bytes, a thinner margin)."),
    ] = "standard",
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Texts such as clients will have, one a line; generated ones when absent.",
        ),
    ] = None,
    embedding_scale: Annotated[
        float | None,
        typer.Option(help="What embeddings are divided by; found when absent."),
    ] = None,
) -> None:
    """Make an artefact of a transformers classifier: its last linear layer becomes the head.

    Everything before that layer becomes public. Code and pickle that come with a checkpoint are
    never run.

    Example: veilhead-server import-hf checkpoints/triage --out artifacts/triage
    """
    with reported():
        for module in ("torch", "transformers"):
            if find_spec(module) is None:
                raise ModuleNotFoundError(name=module)

        from veilhead_models.hf_import import import_hf as import_checkpoint
        from veilhead_models.hf_import import read_texts

        manifest, report = import_checkpoint(
            source,
            out,
            name=name,
            parameters=parameters,
            texts=None if texts is None else read_texts(texts),
            embedding_scale=embedding_scale,
        )
    typer.echo(report.render())
    typer.echo(f"{manifest.name}: {out} (digest {manifest.digest.hex()})")


@app.command("export-onnx")
def export_onnx(
    directory: Annotated[Path, typer.Argument(help="An artefact with a backbone.")],
    precision: Annotated[
        list[str] | None,
        typer.Option(help="fp32 or fp16, how weights are stored; repeat it for both."),
    ] = None,
) -> None:
    """Give an artefact's backbone an ONNX form, so that clients need no torch. Then publish it.

    The manifest changes, and its digest: it is another version of the model. Half precision halves
    what clients fetch; they compute in single precision either way. Prints how far each is from
    torch, on texts of its own.

    Example: veilhead-server export-onnx artifacts/icd10-chapters
    """
    with reported():
        for name in ("torch", "transformers", "onnxscript", "onnxruntime"):
            if find_spec(name) is None:
                raise ModuleNotFoundError(name=name)

        from veilhead_models.onnx_export import export_onnx as export

        manifest, parities = export(directory, precisions=precision or ["fp32"])
    for parity in parities:
        typer.echo(parity.render())
    typer.echo(f"{manifest.name}: {directory} (digest {manifest.digest.hex()})")


@app.command()
def publish(
    directory: Annotated[
        Path, typer.Argument(help="An artefact that `train` or `import-hf` made.")
    ],
    store: Annotated[Path, typer.Option(help="The store that `run` serves.")],
    sign_with: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Sign the manifest with this signing key.")
    ] = None,
    head_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Encrypt the head in the store; VEILHEAD_SERVER_HEAD_KEY_FILE when absent.",
        ),
    ] = None,
    retire_previous_after: Annotated[
        str | None,
        typer.Option(metavar="DATE", help="Serve the version before this one until then; UTC."),
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A card, from `veilhead-server card`, to be served."),
    ] = None,
    policy: _PolicyName = None,
    allow_bulk: Annotated[
        bool,
        typer.Option(
            "--allow-bulk",
            help="Answer thousands of texts at once: hides the head from honest clients only.",
        ),
    ] = False,
    deidentify: Annotated[
        bool,
        typer.Option(
            "--deidentify",
            help="Ask clients to replace e-mail addresses, account numbers and the like.",
        ),
    ] = False,
) -> None:
    """Put an artefact into a store. A service that runs on the store notices by itself.

    The head first answers a self-test. Published again, the same artefact gains a signature or
    an encrypted head, and what was damaged is written anew. A store with an encrypted head takes
    no plaintext one.

    Example: veilhead-server publish artifacts/icd10-chapters --store store
    """
    with reported():
        from veilhead_service.card_cli import read_card
        from veilhead_service.model_store import publish as publish_artifact
        from veilhead_service.retirement import Retirement
        from veilhead_service.signing import SigningKey

        manifest = publish_artifact(
            directory,
            store,
            signing_key=None if sign_with is None else SigningKey.load(sign_with),
            head_key=_head_key(head_key_file),
            retire_previous=(
                None if retire_previous_after is None else Retirement.parse(retire_previous_after)
            ),
            card=None if card is None else read_card(card),
            policy=_policy(policy),
            allow_bulk=allow_bulk,
            deidentify=deidentify,
        )
    for line in _policy_lines(manifest.policy):
        typer.echo(line)
    typer.echo(f"{manifest.name}: published in {store} (digest {manifest.digest.hex()})")


def _head_key(file: Path | None) -> HeadKey | None:
    """The head key of a flag, or else of the service's settings, which may ask for one."""
    from veilhead_service.settings import Settings

    if file is not None:
        return HeadKey.load(file)
    settings = Settings()
    head_key = settings.open_head_key()
    if head_key is None and settings.require_encrypted_heads:
        raise StoreError(
            "VEILHEAD_SERVER_REQUIRE_ENCRYPTED_HEADS is set and no head key was given: "
            "publish with --head-key-file"
        )
    return head_key


@app.command()
def run(
    store: Annotated[Path | None, typer.Option(help="The store to serve.")] = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="The port to listen on.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Evaluating processes; one a core when absent.")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="Directory of tenants, budgets and the access log."),
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="json or text.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    insecure_no_tenants: Annotated[
        bool,
        typer.Option(
            "--insecure-no-tenants", help="Let everybody do everything; loopback hosts only."
        ),
    ] = False,
) -> None:
    """Serve a store over HTTP until it is stopped.

    Every request but those for its health needs an API key of a tenant, which `veilhead-server
    tenants add` makes; a running service notices. It speaks plain HTTP: beyond loopback, put a
    proxy in front that speaks TLS.

    Flags come before VEILHEAD_SERVER_* variables, these before the file; `veilhead-server
    settings` prints what is in force.

    Example: veilhead-server run --store store
    """
    with reported():
        from veilhead_service.app import create_app
        from veilhead_service.machine import available_bytes
        from veilhead_service.server import serve
        from veilhead_service.settings import WORKER_BYTES
        from veilhead_service.state import State

        settings, _ = from_flags(
            config,
            assignments,
            store=store,
            host=host,
            port=port,
            workers=workers,
            state_directory=state,
            insecure_no_tenants=insecure_no_tenants or None,
            log_format=log_format,
            log_level=log_level,
        )
        logs.configure(settings.log_format, settings.log_level)
        if settings.insecure_no_tenants:
            _logger.warning(
                "insecure: without tenants, whoever reaches %s port %d may use every model",
                settings.host,
                settings.port,
            )
        else:
            State(settings.state_directory).close()  # what is wrong with it is said here
        free = available_bytes()
        if free is not None and free < settings.workers * WORKER_BYTES + settings.key_memory_bytes:
            _logger.warning(
                "%d workers take %d MiB and more, and %d MiB are free: `veilhead-server doctor`",
                settings.workers,
                settings.workers * WORKER_BYTES // 2**20,
                free // 2**20,
            )
        serve(create_app(settings), settings, host=settings.host, port=settings.port)
