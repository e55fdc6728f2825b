"""Runs attacks by name, and keeps what they found."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from veilhead_benchmarks.attacks import (
    adversarial,
    attributes,
    crafted_ciphertext,
    crafted_messages,
    dp_audit,
    extraction,
    inversion,
    key_recovery,
    label_noise,
    membership,
    traffic,
)
from veilhead_benchmarks.attacks.results import AttackResult, print_results, write_results
from veilhead_benchmarks.console import wide_console

#: Attack -> what runs it.
ATTACKS: Final[Mapping[str, Callable[..., list[AttackResult]]]] = {
    "adversarial-text": adversarial.run,
    "attributes": attributes.run,
    "crafted-ciphertext": crafted_ciphertext.run,
    "crafted-messages": crafted_messages.run,
    "dp-audit": dp_audit.run,
    "extraction": extraction.run,
    "inversion": inversion.run,
    "label-noise": label_noise.run,
    "key-recovery": key_recovery.run,
    "membership": membership.run,
    "traffic": traffic.run,
}


def run_attacks(name: str | None, *, short: bool, out: Path) -> bool:
    """Run one attack or all, write the JSON file, print a table; whether every promise held.

    Raises:
        KeyError: when there is no such attack.
    """
    console = wide_console()
    chosen = dict(ATTACKS) if name is None else {name: ATTACKS[name]}
    results: list[AttackResult] = []
    seconds: dict[str, float] = {}
    for attack, run in chosen.items():
        started = time.monotonic()
        results += run(short=short)
        seconds[attack] = round(time.monotonic() - started, 1)
        console.print(f"{attack}: {seconds[attack]:.0f} s", highlight=False)
    write_results(results, out, seconds)
    print_results(results)
    console.print(f"results in {out}", highlight=False)
    return all(result.holds is not False for result in results)
