"""Attacks on the service and on what crosses the wire, in their short forms.

Each of them has a control: a system that lacks the protection, where the attack succeeds.
"""

from __future__ import annotations

import numpy as np
import pytest

from veilhead_benchmarks.attacks import (
    crafted_ciphertext,
    crafted_messages,
    extraction,
    key_recovery,
    naive,
    traffic,
)
from veilhead_benchmarks.rows import SYSTEMS

#: Key recovery of ours has no short form; tests/client_sdk/test_key_attacks.py runs it.
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


def test_both_naive_services_lose_their_head_to_one_message() -> None:
    found = {
        result.system: result.value
        for result in crafted_ciphertext.run(short=True)
        if result.metric == "largest error of any weight"
    }
    assert found.keys() == {"tenseal-mm", "tenseal-batched"}
    assert max(found.values()) < 1e-5


def test_a_budget_ends_what_a_thief_gets_of_a_service() -> None:
    results = [one for one in extraction.run(short=True) if one.curve == "budget"]
    answers, agreement = results
    assert (answers.value, answers.samples, answers.at) == (10, 30, 10)  # it asked for 30
    assert agreement.holds
    assert agreement.value < 0.9  # as much as 25 answers would have given


def test_a_client_of_tenseal_gives_its_key_away_with_what_it_shares() -> None:
    exact, rounded = key_recovery.attack_naive_service(4)
    assert exact.value < 1e-6
    assert exact.holds
    assert rounded.value > 1
    assert rounded.holds


def test_what_a_naive_service_is_sent_looks_uniform() -> None:
    features = naive.query_features(np.vstack([np.zeros((3, 64)), np.eye(64)[:3]]))
    assert features.shape == (6, 8192)
    assert np.abs(features).max() <= 1
    # Means of uniform numbers, six standard errors wide.
    assert np.abs(features.mean(axis=1)).max() < 6 / np.sqrt(3 * 8192)
    assert np.abs((features**2).mean(axis=1) - 1 / 3).max() < 6 * np.sqrt(4 / 45 / 8192)


def test_messages_of_other_shapes_are_not_relabelled() -> None:
    with pytest.raises(ValueError, match="encrypted vector"):
        naive.relabelled(b"\x12\x01\x05", 4096)
    assert naive.relabelled(b"\x0a\x02\x80\x03rest", 4096) == b"\x0a\x02\x80\x20rest"
    with pytest.raises(ValueError, match="encrypted tensor of 385 rows"):
        naive.relabelled_batch(b"body\x20\x05", 385, 1)
    assert naive.relabelled_batch(b"body\x20\x81\x03", 385, 1) == b"body\x20\x01"


def test_what_is_seen_of_one_secret_only_is_no_identification() -> None:
    assert traffic.share_identified(["same"] * 8) == pytest.approx(1 / 8)
    assert traffic.share_identified(range(8)) == 1.0
