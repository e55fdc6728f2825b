"""`veilhead-server models`, `retire`, `signing-key` and `head-key`."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from veilhead_protocol.errors import StoreError
from veilhead_protocol.manifest import NAME_PATTERN
from veilhead_service.head_encryption import HeadKey
from veilhead_service.model_status import ask_retry, read_unavailable
from veilhead_service.model_store import ModelStore, StoredModel, retire
from veilhead_service.reporting import reported
from veilhead_service.retirement import Retirement
from veilhead_service.signing import SigningKey
from veilhead_service.store_versions import check_store_format

models_app = typer.Typer(no_args_is_help=True, help="Look at what a store holds.")
signing_key_app = typer.Typer(
    no_args_is_help=True, help="Keys that sign manifests: clients pin the public half."
)
head_key_app = typer.Typer(no_args_is_help=True, help="Keys that encrypt private heads at rest.")

_Store = Annotated[Path, typer.Option(help="The store.")]
_State = Annotated[
    Path,
    typer.Option(
        "--state",
        envvar="VEILHEAD_SERVER_STATE_DIRECTORY",
        help="The state directory of the service on that store.",
    ),
]
_DEFAULT_STATE = Path("state")


@head_key_app.callback()
def _head_key() -> None:
    """Keep `head-key` a command with subcommands."""


@models_app.command("list")
def list_models(
    store: _Store,
    state: _State = _DEFAULT_STATE,
    as_json: Annotated[bool, typer.Option("--json", help="JSON.")] = False,
) -> None:
    """Every version of every model: current, signed, encrypted, retired, and its size.

    What a running service cannot answer for is shown as it says: quarantined, refused, unreadable.

    Example: veilhead-server models list --store store
    """
    with reported():
        told = {(row["name"], row["digest"]): row for row in read_unavailable(state)}
        rows = list(_rows(store, datetime.now(UTC)))
    for row in rows:
        trouble = told.get((row["name"], row["digest"]))
        if trouble is None and row["current"]:
            trouble = told.get((row["name"], None))
        if trouble is not None:
            row |= {"state": trouble["why"], "error": trouble["reason"]}
    if as_json:
        typer.echo(json.dumps({"models": rows}, indent=2))
        return
    table = Table("name", "current", "state", "head", "signed by", "MB", "digest", box=None)
    for row in rows:
        table.add_row(
            row["name"],
            "yes" if row["current"] else "",
            row["state"] if row["until"] is None else f"{row['state']}, until {row['until']}",
            row["head"] or "",
            " ".join(row["signed_by"]),
            f"{row['bytes'] / 1e6:.1f}",
            row["digest"],
        )
    # Wide enough for a digest wherever it is printed: digests are there to be copied.
    console = Console(markup=False, highlight=False, width=200, soft_wrap=True)
    console.print(table)


@models_app.command("retry")
def retry_model(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    state: _State = _DEFAULT_STATE,
) -> None:
    """Let the running service try a model that it has quarantined, now and not later.

    It is tried alone, in a process that serves nothing else, within seconds; the log tells how
    that went.

    Example: veilhead-server models retry icd10-chapters --state state
    """
    with reported():
        if not NAME_PATTERN.fullmatch(name):
            raise StoreError("a model's name has 1 to 64 letters, digits, '.', '_' and '-'")
        ask_retry(state, name)
    typer.echo(f"{name}: the service tries it again within seconds; its log tells how that went")


def _rows(store: Path, now: datetime) -> Iterator[dict[str, Any]]:
    if not store.is_dir():
        raise StoreError(f"{store} is not a directory: expected a store that `publish` made")
    check_store_format(store)
    models = ModelStore(store, check_heads=False)
    for name in models.names():
        try:
            current = models.current_digest(name)
            versions = list(models.versions(name))
        except StoreError as error:
            row = {"name": name, "digest": "", "current": True}
            yield row | _damaged(store / name, error)
            continue
        for digest, model in versions:
            yield {"name": name, "digest": digest, "current": digest == current} | (
                _damaged(store / name / digest, model)
                if isinstance(model, StoreError)
                else _state(model, now)
            )


def _state(model: StoredModel, now: datetime) -> dict[str, Any]:
    retirement = model.retirement
    over = retirement is not None and retirement.is_over(now)
    return {
        "state": "retired" if over else "served",
        "until": None if retirement is None else str(retirement),
        "head": "encrypted" if model.is_encrypted else "plaintext",
        "signed_by": [item.key_id.hex() for item in model.signatures],
        "bytes": _size(model.directory),
    }


def _damaged(directory: Path, error: StoreError) -> dict[str, Any]:
    return {
        "state": "damaged",
        "until": None,
        "head": None,
        "signed_by": [],
        "bytes": _size(directory),
        "error": str(error),
    }


def _size(directory: Path) -> int:
    """Bytes of the files there, as far as they can be looked at."""
    total = 0
    with suppress(OSError):
        for path in directory.rglob("*"):
            with suppress(OSError):
                status = path.lstat()
                total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def retire_model(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    digest: Annotated[
        str | None, typer.Argument(help="The version; the current one when it is absent.")
    ] = None,
    store: _Store = Path("store"),
    after: Annotated[
        str | None,
        typer.Option(
            metavar="DATE",
            help="The moment it ends: 2027-03-31 (as that day begins) or 2027-03-31T18:00Z; UTC.",
        ),
    ] = None,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Serve it on after all.")] = False,
) -> None:
    """Take a version out of service from a date on. A running service notices by itself.

    Until then it answers as before, and its manifest says so in a `Sunset` header. From then on
    clients get 410. Nothing is deleted.

    Example: veilhead-server retire icd10-chapters --after 2027-03-31 --store store
    """
    if (after is None) != withdraw:
        raise typer.BadParameter("give --after DATE or --withdraw")
    with reported():
        retirement = None if after is None else Retirement.parse(after)
        found = retire(store, name, digest, retirement)
    if retirement is None:
        typer.echo(f"{name}: {found} is served again")
    elif retirement.is_over(datetime.now(UTC)):
        typer.echo(f"{name}: {found} is not served any more")
    else:
        typer.echo(f"{name}: {found} is served until {retirement}")


@signing_key_app.command("new")
def new_signing_key(
    file: Annotated[Path, typer.Argument(help="A new file; keep it off the server.")],
) -> None:
    """Make a signing key and print its public half, which clients pass as --vendor-key.

    Example: veilhead-server signing-key new vendor.pem
    """
    with reported():
        typer.echo(str(SigningKey.create(file).public))


@signing_key_app.command("show")
def show_signing_key(file: Annotated[Path, typer.Argument(help="A signing key.")]) -> None:
    """Print the public half of a signing key."""
    with reported():
        typer.echo(str(SigningKey.load(file).public))


@head_key_app.command("new")
def new_head_key(
    file: Annotated[Path, typer.Argument(help="A new file; keep it off the store.")],
) -> None:
    """Make a key for private heads, and print its id. Without the key they cannot be read again.

    Example: veilhead-server head-key new head.key
    """
    with reported():
        typer.echo(HeadKey.create(file).id.hex())
