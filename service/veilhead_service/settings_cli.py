"""`veilhead-server settings`, and how flags become settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veilhead_protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from veilhead_service.settings import Settings

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="A TOML file of settings; else $VEILHEAD_SERVER_CONFIG."),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting; may be repeated."),
]


def from_flags(
    config: Path | None, assignments: list[str] | None, **flags: Any
) -> tuple[Settings, dict[str, Any]]:
    """The settings, and those of them that were given as flags.

    Args:
        config: the settings file.
        assignments: NAME=VALUE pairs.
        flags: settings that have a flag of their own, None where it was not given.

    Raises:
        ConfigurationError: when a setting is unknown, not valid, or given twice.
    """
    from veilhead_service.settings import load_settings

    given = {name: value for name, value in flags.items() if value is not None}
    for assignment in assignments or []:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigurationError("--set expects NAME=VALUE")
        if name in given:
            raise ConfigurationError(f"the setting {name!r} is given twice")
        given[name] = value
    return load_settings(given, config=config), given


def show(
    config: ConfigFile = None,
    assignments: Assignments = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Print every setting, with secrets masked, and where each comes from.

    Flags come before VEILHEAD_SERVER_* variables, these before the file, and that before defaults.

    Example: veilhead-server settings --config veilhead.toml
    """
    from veilhead_service.settings import printed

    try:
        rows = printed(*from_flags(config, assignments))
    except ConfigurationError as error:
        typer.echo(f"veilhead-server: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        found = {name: {"value": value, "origin": origin} for name, value, origin in rows}
        typer.echo(json.dumps(found, indent=2))
        return
    wide = max(len(name) for name, _, _ in rows)
    for name, value, origin in rows:
        typer.echo(f"{name:<{wide}}  {value}  ({origin})")
