"""How the vendor's commands report an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from veilhead_protocol.errors import VeilheadError
from veilhead_service.background import reason_of


@contextmanager
def reported() -> Iterator[None]:
    """Our errors and the operating system's as one line on standard error, and exit status 1."""
    try:
        yield
    except VeilheadError as error:
        typer.echo(f"veilhead-server: {error}", err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        typer.echo(f"veilhead-server: {reason_of(error)}", err=True)
        raise typer.Exit(1) from error
    except ModuleNotFoundError as error:
        typer.echo(
            f"veilhead-server: this needs {error.name!r}: pip install 'veilhead[service,train]'",
            err=True,
        )
        raise typer.Exit(1) from error
