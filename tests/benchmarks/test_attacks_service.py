"""Attacks on the service and on what crosses the wire, in their short forms.

Each of them has a control: a system that lacks the protection, where the attack succeeds.
"""

from __future__ import annotations

import pytest

from veilhead_benchmarks.attacks import (
    crafted_ciphertext,
    crafted_messages,
    extraction,
    key_recovery,
    traffic,
)

#: Attack, and the systems of which something is promised.
PROMISED = {
    crafted_ciphertext: {"tenseal", "veilhead"},
    crafted_messages: {
        "without re-randomisation",
        "trusting both halves",
        "trusting the query's",
        "trusting the key's",
        "veilhead",
    },
    extraction: {"plaintext", "veilhead"},
    key_recovery: {"unrounded logits", "veilhead"},
    traffic: {"veilhead", "veilhead, padded"},
}


@pytest.mark.parametrize("attack", PROMISED, ids=lambda module: module.__name__.split(".")[-1])
def test_an_attack_works_where_it_should_and_fails_on_the_product(attack) -> None:
    results = attack.run(short=True)
    assert [result for result in results if result.holds is False] == []
    judged = {result.system for result in results if result.holds is not None}
    assert judged == PROMISED[attack]


def test_a_message_that_is_no_vector_of_tenseal_is_not_relabelled() -> None:
    with pytest.raises(ValueError, match="encrypted vector"):
        crafted_ciphertext.relabelled(b"\x12\x01\x05", 4096)


def test_what_is_seen_of_one_secret_only_is_no_identification() -> None:
    assert traffic.share_identified(["same"] * 8) == pytest.approx(1 / 8)
    assert traffic.share_identified(range(8)) == 1.0
