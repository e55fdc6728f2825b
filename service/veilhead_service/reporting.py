"""How the vendor's commands report an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from veilhead_protocol.errors import VeilheadError


@contextmanager
def reported() -> Iterator[None]:
    """Errors of ours as one line on standard error, and exit status 1."""
    try:
        yield
    except VeilheadError as error:
        typer.echo(f"veilhead-server: {error}", err=True)
        raise typer.Exit(1) from error
    except ModuleNotFoundError as error:
        typer.echo(
            f"veilhead-server: this needs {error.name!r}: pip install 'veilhead[service,train]'",
            err=True,
        )
        raise typer.Exit(1) from error
