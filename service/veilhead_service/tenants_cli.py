"""`veilhead-server tenants`: who may use the service, and how much."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from veilhead_protocol.errors import StateError, TenantError
from veilhead_protocol.manifest import NAME_PATTERN
from veilhead_service import witness
from veilhead_service.limits import Budget, Period
from veilhead_service.reporting import reported
from veilhead_service.state import Ending, State
from veilhead_service.tenants import DEFAULT_SCOPES, ApiKey, KeyScope, Tenant, new_api_key

app = typer.Typer(
    name="tenants",
    no_args_is_help=True,
    help=(
        "Tenants, their API keys and their limits. A running service notices every change within "
        "a second."
    ),
)

_DAY: Final = 86400.0
_HOUR: Final = 3600.0
_LONGEST: Final = 36525 * _DAY
_MOST_UNITS: Final = 2**53

_errors = Console(stderr=True, highlight=False)

_Name = Annotated[str, typer.Argument(metavar="NAME", help="The tenant's name.")]
_State = Annotated[
    Path,
    typer.Option(
        "--state",
        envvar="VEILHEAD_SERVER_STATE_DIRECTORY",
        help="The directory of the service's state.",
    ),
]
_Expires = Annotated[
    float | None,
    typer.Option(min=0, metavar="DAYS", help="Days until the key ends."),
]
_Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]

_DEFAULT_STATE: Final = Path("state")


@contextmanager
def _opened(directory: Path) -> Iterator[State]:
    """The state; errors of ours become one line on standard error, and exit status 1."""
    with reported(), State(directory) as state:
        yield state


@contextmanager
def _to_change(directory: Path) -> Iterator[State]:
    """The state, once it is known to be the one that the access log knows."""
    with _opened(directory) as state:
        witness.check_command(state, directory)
        yield state


@app.command()
def add(
    name: _Name,
    scope: Annotated[
        list[KeyScope] | None,
        typer.Option(help="What the key may do, once for each; infer, models, usage if none."),
    ] = None,
    expires: _Expires = None,
    state: _State = _DEFAULT_STATE,
) -> None:
    """Add a tenant, and print its API key: the only time that it is shown.

    Example: veilhead-server tenants add clinic --expires 90 --state state
    """
    with _to_change(state) as opened:
        now = time.time()
        ends = None if expires is None else _after(now, expires * _DAY)
        scopes = frozenset(scope) if scope else DEFAULT_SCOPES
        key, written = new_api_key(name, scopes, now=now, expires=ends)
        opened.add_tenant(key)
    _show_once(key, written)


@app.command()
def rotate(
    name: _Name,
    grace: Annotated[
        float, typer.Option(min=0, metavar="HOURS", help="Hours for which the old key still works.")
    ] = 24.0,
    expires: _Expires = None,
    state: _State = _DEFAULT_STATE,
) -> None:
    """Print a new API key of a tenant; its other keys end after the grace period.

    The new key has the scopes of the newest old one, and without --expires its length of life.

    Example: veilhead-server tenants rotate clinic --grace 48
    """
    with _to_change(state) as opened:
        now = time.time()
        old = [key for key in opened.api_keys() if key.tenant == name]
        if not old:
            raise TenantError("there is no such tenant: `list` shows those that are")
        newest = old[-1]
        ends = None if newest.expires is None else now + newest.expires - newest.created
        if expires is not None:
            ends = _after(now, expires * _DAY)
        key, written = new_api_key(name, newest.scopes, now=now, expires=ends)
        opened.rotate(key, others_end=_after(now, grace * _HOUR))
        _show_once(key, written)
        witness.record_endings(opened, state)


@app.command()
def revoke(
    name: _Name,
    key: Annotated[
        str | None, typer.Option(metavar="ID", help="One key; all of the tenant's if none.")
    ] = None,
    state: _State = _DEFAULT_STATE,
) -> None:
    """End a tenant's keys at once. `rotate` lets it in again.

    Exit status 1, although they have ended, when the access log does not say so within 5 seconds.

    Example: veilhead-server tenants revoke clinic
    """
    with _to_change(state) as opened:
        revoked = opened.revoke(name, key)
        typer.echo(f"{name}: {len(revoked)} keys revoked")
        witness.record_endings(opened, state)


@app.command("list")
def list_tenants(as_json: _Json = False, state: _State = _DEFAULT_STATE) -> None:
    """Show tenants, the ids and scopes of their keys, and limits of their own; no secrets.

    Example: veilhead-server tenants list --json
    """
    with _opened(state) as opened:
        keys, budgets = opened.api_keys(), opened.budgets()
        rows = [_row(tenant, keys, budgets) for tenant in opened.tenants()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None)
    for column in ("tenant", "key", "status", "scopes", "expires", "limits"):
        table.add_column(column, no_wrap=column in ("tenant", "key", "status"))
    for row in rows:
        limits = ["{model}: {budget} a {period}".format(**item) for item in row["budgets"]]
        if row["rate_per_second"] is not None:
            limits.insert(0, f"{row['rate_per_second']:g} a second")
        for item in row["keys"]:
            table.add_row(
                row["tenant"],
                item["id"],
                item["status"],
                " ".join(item["scopes"]),
                item["expires"] or "never",
                ", ".join(limits),
            )
    Console(markup=False, highlight=False).print(table)


@app.command()
def limit(
    name: _Name,
    model: Annotated[str | None, typer.Option(help="The model that the budget is for.")] = None,
    budget: Annotated[
        int | None, typer.Option(min=0, max=_MOST_UNITS, help="Queries in each period.")
    ] = None,
    period: Annotated[Period, typer.Option(help="Calendar day or month, UTC.")] = Period.DAY,
    rate: Annotated[
        float | None, typer.Option(metavar="N", help="Requests a second, in the long run.")
    ] = None,
    burst: Annotated[int | None, typer.Option(min=1, help="Requests at once.")] = None,
    state: _State = _DEFAULT_STATE,
) -> None:
    """Set a tenant's budget of a model, or its request rate, in place of the service's defaults.

    Example: veilhead-server tenants limit clinic --model icd10-chapters --budget 5000 --period day
    """
    with _to_change(state) as opened:
        if (model is None) != (budget is None):
            raise TenantError("--model and --budget go together")
        if rate is None and burst is None and model is None:
            raise TenantError("nothing to set: give --model and --budget, or --rate or --burst")
        if rate is not None and not 0 < rate < float("inf"):
            raise TenantError("--rate is more than 0")
        if model is not None and not NAME_PATTERN.fullmatch(model):
            raise TenantError("--model is not the name of a model")
        if rate is not None or burst is not None:
            opened.set_rate(name, rate, burst)
        if model is not None:
            opened.set_budget(name, model, Budget(budget, period))
    typer.echo(f"{name}: limits set")


@app.command()
def audit(state: _State = _DEFAULT_STATE) -> None:
    """Show what operators did to tenants, oldest first, one JSON object a line."""
    with _opened(state) as opened:
        entries = opened.audit()
    for entry in entries:
        row = {
            "at": _written(entry.at),
            "action": entry.action,
            "tenant": entry.tenant,
            "detail": entry.detail,
        }
        typer.echo(json.dumps(row))


@app.command("accept-restored")
def accept_restored(
    without_log: Annotated[
        bool,
        typer.Option(
            "--without-log",
            help="Go on although files of the access log are lost: whom they say to have been "
            "revoked since the backup is let in again.",
        ),
    ] = False,
    state: _State = _DEFAULT_STATE,
) -> None:
    """Use a state that was restored from a backup, once the keys that were ended since have ended.

    The access log says which these are. Prints each; look through `list` for what else the backup
    brought back: limits, and what was used of budgets.

    Example: veilhead-server tenants accept-restored --state state
    """
    with _opened(state) as opened:
        try:
            witness.check_command(opened, state)
        except StateError as error:
            typer.echo(f"refused so far: {error}", err=True)
        else:
            typer.echo("nothing to accept: the access log and this state agree")
            return
        done = witness.accept(opened, state, without_log=without_log)
        for key, ending in done.ended:
            typer.echo(f"ended again: key {key} of {ending.tenant}, {_told(ending)}")
        for key, ending in done.missing:
            typer.echo(f"not in this state: key {key} of {ending.tenant}, {_told(ending)}")
        now = time.time()
        active = sum(item.status(now) == "active" for item in opened.api_keys())
        typer.echo(f"accepted: {len(done.ended)} keys ended again, {active} are active")


def _told(ending: Ending) -> str:
    at = _written(ending.ends)
    return f"revoked {at}" if ending.how == "revoked" else f"rotated, ends {at}"


def _after(now: float, seconds: float) -> float:
    if not seconds <= _LONGEST:  # nor when it is no number
        raise TenantError("keys and grace periods end within a hundred years")
    return now + seconds


def _show_once(key: ApiKey, written: str) -> None:
    _errors.print(
        f"API key {key.id} of {key.tenant}, shown this once: keep it where only its user can read",
        markup=False,
        soft_wrap=True,
    )
    typer.echo(written)


def _row(
    tenant: Tenant, keys: list[ApiKey], budgets: dict[tuple[str, str], Budget]
) -> dict[str, Any]:
    now = time.time()
    return {
        "tenant": tenant.name,
        "created": _written(tenant.created),
        "rate_per_second": tenant.rate_per_second,
        "burst": tenant.burst,
        "budgets": [
            {"model": model, "budget": budget.units, "period": budget.period.value}
            for (owner, model), budget in sorted(budgets.items())
            if owner == tenant.name
        ],
        "keys": [
            {
                "id": key.id,
                "status": key.status(now),
                "scopes": sorted(key.scopes),
                "created": _written(key.created),
                "expires": None if key.expires is None else _written(key.expires),
                "revoked": None if key.revoked is None else _written(key.revoked),
            }
            for key in keys
            if key.tenant == tenant.name
        ],
    }


def _written(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
