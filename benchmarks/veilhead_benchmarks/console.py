"""The console that tables are printed on."""

from __future__ import annotations

from typing import Final

from rich.console import Console

_WIDTH: Final = 150


def wide_console() -> Console:
    """As wide as the terminal, or wide enough for every column when the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)
