"""Policies: what each clause asks for, and what breaks it."""

from __future__ import annotations

import pytest
from support.heads import artifact

from veilhead_protocol.errors import ManifestError
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.policy import (
    GUARDS,
    PRESETS,
    BudgetClause,
    PolicySection,
    PrivacyClause,
    preset_policy,
)

#: For each clause a value that asks for less than every preset that has the clause.
WEAKER = {
    "minimum_parameters": "compact",
    "bulk": True,
    "deidentify": False,
    "query_budget": None,
    "privacy": None,
}

PRIVATE = {"privacy": {"epsilon": 4.0, "delta": 1e-5}}


def under(policy, *, parameters="standard", about=PRIVATE):
    document = artifact(3, 20, parameters=parameters).manifest.model_dump()
    return Manifest.build(document | {"policy": policy, "about": about})


def test_every_clause_says_who_sees_to_it() -> None:
    assert GUARDS.keys() == PolicySection.model_fields.keys() - {"preset"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_manifest_carries_its_preset(name: str) -> None:
    manifest = under(preset_policy(name))
    again = Manifest.deserialize(manifest.serialize())
    assert again.policy == preset_policy(name)
    assert again.policy.preset == name


def test_clauses_that_say_nothing_are_not_in_the_bytes() -> None:
    assert set(PolicySection().model_dump()) == {"minimum_parameters", "bulk"}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("clause", WEAKER)
def test_a_policy_is_never_weaker_than_the_preset_it_names(name: str, clause: str) -> None:
    policy = preset_policy(name)
    weaker = dict(policy) | {clause: WEAKER[clause]}
    if weaker == dict(policy):
        assert PolicySection.model_validate(weaker) == policy  # nothing is asked for here
        return
    asked = {"minimum_parameters": "standard", "bulk": False, "deidentify": True}
    if clause in asked and getattr(PRESETS[name], clause) != asked[clause]:
        return  # the preset itself does not ask for it
    with pytest.raises(ManifestError, match=f"{clause} is weaker than the preset {name}"):
        under(weaker)


@pytest.mark.parametrize(
    ("clause", "value"),
    [
        ("minimum_parameters", "standard"),
        ("bulk", False),
        ("deidentify", True),
        ("query_budget", BudgetClause(units=1, period="month")),
        ("privacy", PrivacyClause(max_epsilon=0.5, max_delta=1e-9)),
    ],
)
def test_a_policy_may_ask_for_more_than_its_preset(clause: str, value: object) -> None:
    for name in PRESETS:
        PolicySection.model_validate(dict(preset_policy(name)) | {clause: value})


@pytest.mark.parametrize(("units", "period"), [(10_001, "day"), (310_001, "month")])
def test_a_larger_budget_is_weaker(units: int, period: str) -> None:
    larger = dict(preset_policy("medical")) | {"query_budget": {"units": units, "period": period}}
    with pytest.raises(ManifestError, match="query_budget is weaker"):
        under(larger)


@pytest.mark.parametrize("name", ["medical", "finance"])
def test_some_fields_ask_for_standard_parameters(name: str) -> None:
    with pytest.raises(
        ManifestError, match=rf"policy\.minimum_parameters: the policy {name} asks for standard"
    ):
        under(preset_policy(name), parameters="compact")


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"privacy": None},
        {"privacy": "yes"},
        {"privacy": {"epsilon": True, "delta": 1e-5}},
        {"privacy": {"epsilon": 4.01, "delta": 1e-5}},
        {"privacy": {"epsilon": 4.0, "delta": 1.01e-5}},
    ],
)
def test_medical_asks_for_differential_privacy(about: dict[str, object]) -> None:
    with pytest.raises(ManifestError, match=r"policy\.privacy: the policy medical asks for .*at m"):
        under(preset_policy("medical"), about=about)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="medical"):
        preset_policy("military")
    with pytest.raises(ManifestError, match="policy"):
        under({"preset": "military"})
