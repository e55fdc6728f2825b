"""Attacks on the service and on what crosses the wire, in their short forms.

Each of them has a control: a system that lacks the protection, where the attack succeeds.
"""

from __future__ import annotations

import pytest

from veilhead_benchmarks.attacks import (
    crafted_ciphertext,
    crafted_messages,
    extraction,
    traffic,
)
from veilhead_benchmarks.rows import SYSTEMS

#: Key recovery has no short form; tests/client_sdk/test_key_attacks.py runs it.
#: Attack, and what its controls say in their results: (system, part of the target).
CONTROLS = {
    crafted_ciphertext: ("tenseal-mm", "one query"),
    crafted_messages: ("veilhead", "trusting both halves"),
    extraction: ("plaintext", "100 queries"),
    traffic: ("veilhead", "1 to 256, from sizes"),
}


@pytest.mark.parametrize("attack", CONTROLS, ids=lambda module: module.__name__.split(".")[-1])
def test_an_attack_works_where_it_should_and_fails_on_the_product(attack) -> None:
    results = attack.run(short=True)
    assert [result for result in results if result.holds is False] == []
    assert {result.system for result in results} <= set(SYSTEMS)  # as the report reads them
    system, target = CONTROLS[attack]
    control = [one for one in results if one.system == system and target in one.target]
    assert any(one.holds for one in control)
    assert any(one.holds and one not in control for one in results)


def test_a_message_that_is_no_vector_of_tenseal_is_not_relabelled() -> None:
    with pytest.raises(ValueError, match="encrypted vector"):
        crafted_ciphertext.relabelled(b"\x12\x01\x05", 4096)


def test_what_is_seen_of_one_secret_only_is_no_identification() -> None:
    assert traffic.share_identified(["same"] * 8) == pytest.approx(1 / 8)
    assert traffic.share_identified(range(8)) == 1.0
