"""A policy holds training to what it asks for, before any work is done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from veilhead_models.backbone import Backbone, describe
from veilhead_models.datasets import Dataset, Split
from veilhead_models.privacy import PrivacyBudget
from veilhead_models.training import train_artifact
from veilhead_protocol.errors import ManifestError
from veilhead_protocol.policy import preset_policy

SPLIT = Split(texts=("fever", "cough") * 150, targets=np.array([0, 1] * 150, dtype=np.intp))
DATASET = Dataset("made-up", SPLIT, SPLIT, ("no", "yes"), "here", None)


@pytest.mark.parametrize(
    ("parameters", "privacy", "clause"),
    [
        ("compact", PrivacyBudget(4.0), "policy.minimum_parameters: the policy medical asks for"),
        ("standard", None, "policy.privacy: .* this one was trained without"),
        ("standard", PrivacyBudget(4.1), "policy.privacy: .* this one has 4.1 and 1e-05"),
        ("standard", PrivacyBudget(4.0, 1e-4), "policy.privacy: .* this one has 4 and 0.0001"),
    ],
)
def test_a_head_that_would_break_the_policy_is_not_trained(
    tiny_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    parameters: str,
    privacy: PrivacyBudget | None,
    clause: str,
) -> None:
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: pytest.fail("a backbone was loaded"))
    with pytest.raises(ManifestError, match=clause):
        train_artifact(
            DATASET,
            tiny_directory,
            describe(tiny_directory),
            name="model",
            parameters=parameters,
            privacy=privacy,
            policy=preset_policy("medical"),
        )


def test_a_head_that_meets_its_policy_carries_it(tiny_directory: Path) -> None:
    artifact, _ = train_artifact(
        DATASET,
        tiny_directory,
        describe(tiny_directory),
        name="model",
        parameters="standard",
        device="cpu",
        privacy=PrivacyBudget(4.0),
        policy=preset_policy("medical"),
    )
    assert artifact.manifest.policy.preset == "medical"
    assert artifact.manifest.about["privacy"]["epsilon"] == 4.0
