"""How long a light tenant's query takes beside a heavy tenant of more and more connections."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.table import Table

from veilhead_benchmarks.console import wide_console
from veilhead_benchmarks.processes import ServiceProcess, add_tenants, publish_random, unit_rows
from veilhead_benchmarks.recording import Exchange, Side, Voice, put

_CLASSES: Final = 22
_DIMENSIONS: Final = 384
_QUERIES: Final = 4
CONNECTIONS: Final = (0, 8, 64, 256)


@dataclass(frozen=True)
class Row:
    """The light tenant, which has one connection, beside one heavy tenant.

    Attributes:
        connections: of the heavy tenant.
        polite: whether that honours `Retry-After`; None where it has no connections.
        light: what came of the light tenant's queries.
        heavy: what came of the other's.
    """

    connections: int
    polite: bool | None
    light: Side
    heavy: Side | None

    @property
    def passed(self) -> bool:
        """Whether every query of the light tenant was answered, and no answer was wrong."""
        wrong = self.light.wrong + (self.heavy.wrong if self.heavy else 0)
        return self.light.checked > 0 and not self.light.lost and not wrong


def run_fairness(
    *,
    seconds: float,
    workers: int = 2,
    connections: Sequence[int] = CONNECTIONS,
    settings: Mapping[str, object] | None = None,
) -> list[Row]:
    """Ask as both tenants at once, for so many seconds a row.

    Args:
        seconds: of each row.
        workers: evaluating processes of the service.
        connections: of the heavy tenant, a polite and an impolite row for each; 0 has one.
        settings: further ones of the service.
    """
    with tempfile.TemporaryDirectory(prefix="veilhead-fairness-") as name:
        work = Path(name)
        artifact = publish_random(work / "store", work, "chapters", _CLASSES, _DIMENSIONS)
        keys = add_tenants(work / "state", 2)
        given = {"insecure_no_tenants": False, "state_directory": work / "state"}
        with ServiceProcess(
            work / "store",
            work / "service.log",
            workers=workers,
            settings={**given, **(settings or {})},
        ) as service:
            light, heavy = (
                tuple(
                    Exchange.record(
                        service,
                        artifact,
                        unit_rows(1, _DIMENSIONS, tenant * _QUERIES + number),
                        key,
                    )
                    for number in range(_QUERIES)
                )
                for tenant, key in enumerate(keys)
            )
            rows = []
            for count in connections:
                for polite in (True, False) if count else (None,):
                    others = [Voice("heavy", count, heavy)] if count else []
                    sides = put(
                        service, [Voice("light", 1, light)], others, seconds, polite=bool(polite)
                    )
                    rows.append(Row(count, polite, *sides))
    return rows


def show(rows: Sequence[Row], out: Path) -> None:
    """Write the rows as JSON, and print them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", "utf-8")
    table = Table(title="a light tenant of one connection beside a heavy one")
    for title in (
        "heavy connections",
        "manner",
        "light p50 ms",
        "light p99 ms",
        "light answers",
        "heavy answers",
        "heavy refusals",
        "heavy generator cores",
        "wrong, lost",
    ):
        table.add_column(title, justify="right")
    manners = {None: "", True: "polite", False: "impolite"}
    for row in rows:
        light, heavy = row.light, row.heavy
        table.add_row(
            str(row.connections),
            manners[row.polite],
            str(light.p50_ms),
            str(light.p99_ms),
            str(light.answered),
            str(heavy.answered if heavy else ""),
            heavy.refusals if heavy else "",
            str(heavy.generator_cores if heavy else ""),
            f"{light.wrong + (heavy.wrong if heavy else 0)}, {light.lost}",
        )
    console = wide_console()
    console.print(table)
    console.print(f"results in {out}", markup=False, highlight=False)
