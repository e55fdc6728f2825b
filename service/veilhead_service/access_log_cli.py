"""`veilhead-server access-log`."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from veilhead_protocol.errors import AccessLogError
from veilhead_service.access_log_chain import FILE_NAME, verify
from veilhead_service.state_file import STATE_FILE

app = typer.Typer(help="The access log and its chain of hashes.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Keep `access-log` a group of commands."""


@app.command("verify")
def verify_command(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="The log, whose closed files beside it count; or several files, oldest first.",
            show_default=str(Path("state") / FILE_NAME),
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="The hash of a record that you noted elsewhere; it must be in the log."),
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(help="The last hash of files that are not given; begin after it."),
    ] = None,
) -> None:
    """Check that no record was changed, removed, inserted or moved.

    Prints the number of records and the hash of the last one: keep it where the service cannot
    write, and give it as --head the next time. Without --head, the record counts that the state
    beside the log remembers, when there is a state: a log that was cut off before it, or written
    anew, is broken. Exit status 1 when the chain is broken, or there is no record.

    Example: veilhead-server access-log verify state/access.log --head 3b0c...
    """
    first, *more = paths or [Path("state") / FILE_NAME]
    remembered = None
    if head is None and after is None:
        remembered = _remembered((more or [first])[-1].parent)
    try:
        found = verify(first, *more, anchor=head or remembered, after=after)
    except AccessLogError as error:
        typer.echo(f"BROKEN: {error}", err=True)
        raise typer.Exit(1) from error
    for note in found.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"whole: {found.records} records, head {found.head}")
    if head is None:
        since = "" if remembered is None else " after the record that the state remembers"
        typer.echo(f"no --head was given: whether the end was cut off{since} cannot be told")


def _remembered(directory: Path) -> str | None:
    """The hash of a record that the state in a directory knows; None when there is none."""
    path = directory / STATE_FILE
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            found = database.execute("SELECT log_head FROM identity").fetchone()
    except sqlite3.Error:  # an older state, or a damaged one: `tenants` says so
        return None
    return found[0] or None
