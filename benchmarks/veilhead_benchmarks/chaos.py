"""Faults under load: what callers of the SDK see while parts of a service die.

Every call must either return logits within the model's error bound or raise one typed error; none
may hang, be lost or be wrong. Where the service can hide a fault, no call may fail at all; and once
the fault is over, every client must get right answers again, without being made anew. With tenants,
budgets and an access log that is required: every answer is charged once and recorded, and who was
revoked is never let in. All of it is on loopback, in a temporary directory, and ends by itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from rich.table import Table

from veilhead_benchmarks import chaos_faults, chaos_state
from veilhead_benchmarks.chaos_load import CLASSES, DIMENSIONS, MODEL, Bench, Outcome, Tenants
from veilhead_benchmarks.console import wide_console
from veilhead_benchmarks.processes import ServiceProcess, publish_random

_BODY_SECONDS: Final = 2.0

FAULTS: Final[tuple[Callable[[Bench], Outcome], ...]] = (
    chaos_faults.kill_workers,
    chaos_faults.send_slowly,
    chaos_faults.send_too_much,
    chaos_faults.kill_service,
    chaos_faults.terminate,
    chaos_faults.corrupt,
    chaos_faults.fill_disk,
    chaos_faults.jump,
    chaos_state.lock_state,
    chaos_state.replace_state,
    chaos_state.delete_state,
    chaos_state.overwrite_state,
    chaos_state.restore_state,
    chaos_state.lose_side_files,
    chaos_state.rotate_log,
)


def run_chaos(*, seconds: float) -> list[Outcome]:
    """Every fault in turn, each under load of about so many seconds; prints a table."""
    console = wide_console()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="veilhead-chaos-") as name:
        work = Path(name)
        artifact = publish_random(work / "store", work, MODEL, CLASSES, DIMENSIONS)
        tenants = Tenants.made_in(work / "state")
        settings = {**tenants.settings(), "body_seconds": _BODY_SECONDS}
        with ServiceProcess(work / "store", work / "service.log", settings=settings) as service:
            bench = Bench(work, work / "store", artifact, service, tenants, seconds)
            for fault in FAULTS:
                outcomes.append(fault(bench))
                shown = "as promised" if outcomes[-1].passed else "FAILED"
                console.print(f"{outcomes[-1].fault}: {shown}", highlight=False)
    table = Table("fault", "calls", "right", "charged", "typed errors", "wrong", "lost", "remarks")
    for outcome in outcomes:
        table.add_row(
            outcome.fault,
            str(outcome.calls),
            str(outcome.right),
            "restored" if outcome.charged is None else str(outcome.charged),
            ", ".join(f"{kind} {count}" for kind, count in sorted(outcome.errors.items())) or "0",
            str(outcome.wrong),
            str(outcome.lost),
            "; ".join([*(f"FAILED: {failure}" for failure in outcome.failures), *outcome.notes]),
        )
    console.print(table, markup=False)
    return outcomes
