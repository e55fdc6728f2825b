"""`veilhead-server access-log`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veilhead_protocol.errors import AccessLogError
from veilhead_service.access_log import FILE_NAME, verify

app = typer.Typer(help="The access log and its chain of hashes.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Keep `access-log` a group of commands."""


@app.command("verify")
def verify_command(
    path: Annotated[Path, typer.Argument(help="The log; closed files beside it count.")] = (
        Path("state") / FILE_NAME
    ),
    head: Annotated[
        str | None,
        typer.Option(help="The hash of a record that you noted elsewhere; it must be in the log."),
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(help="The last hash of closed files that you moved away; begin there."),
    ] = None,
) -> None:
    """Check that no record was changed, removed, inserted or moved.

    Prints the number of records and the hash of the last one: keep it where the service cannot
    write, and give it as --head the next time. Without --head, a log whose end was cut off looks
    whole, and so does one that was written anew from the start. Exit status 1 when the chain is
    broken.

    Example: veilhead-server access-log verify state/access.log --head 3b0c...
    """
    try:
        found = verify(path, anchor=head, after=after)
    except AccessLogError as error:
        typer.echo(f"BROKEN: {error}", err=True)
        raise typer.Exit(1) from error
    for note in found.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"whole: {found.records} records, head {found.head}")
    if head is None:
        typer.echo("no --head was given: whether the end was cut off cannot be told")
