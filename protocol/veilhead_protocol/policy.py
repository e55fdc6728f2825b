"""A model's policy: what its vendor asks of both sides, and who sees to it.

A policy is part of the manifest, so it is pinned with it. A preset names the least that a field
asks for; a policy that names one is never weaker. A manifest that breaks its own policy is refused
by whoever reads it, with the clause that it breaks.
"""

from __future__ import annotations

import math
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from veilhead_protocol.errors import ManifestError
from veilhead_protocol.parameters import PARAMETER_SETS

PresetName = Literal["medical", "finance", "social-media", "network-security", "manufacturing"]

#: Clauses that a policy may lack are left out of the bytes where they say nothing, so that models
#: without them keep the digest that clients pinned.
_OPTIONAL: Final[Any] = Field(default=None, exclude_if=lambda value: value is None)


class Section(BaseModel):
    """A part of the manifest: frozen, strict, without unknown fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, hide_input_in_errors=True, allow_inf_nan=False
    )


class BudgetClause(Section):
    """What a tenant may ask in a calendar day or month, UTC: `units` texts."""

    units: Annotated[int, Field(ge=0, le=2**53)]
    period: Literal["day", "month"]


class PrivacyClause(Section):
    """The weakest differential privacy that the head may have been trained with."""

    max_epsilon: Annotated[float, Field(gt=0, le=1000)]
    max_delta: Annotated[float, Field(gt=0, lt=1)]


class PolicySection(Section):
    """What the vendor asks of both sides.

    `bulk` allows requests of more texts than the hint limit of the set: they hide the head from
    honest keys only. With `deidentify` the client replaces what points at a person before it embeds
    a text, unless its user says otherwise. `GUARDS` says who sees to each clause.

    Attributes:
        preset: the field whose least demands the policy meets.
        minimum_parameters: the weakest parameter set that the model may have.
        bulk: whether requests beyond the hint limit are answered.
        deidentify: whether clients are asked to de-identify texts.
        query_budget: of a tenant that the service's operator gave no other.
        privacy: what training must have guaranteed.
    """

    preset: PresetName | None = _OPTIONAL
    minimum_parameters: Literal["standard", "compact"] = "compact"
    bulk: bool = False
    deidentify: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    query_budget: BudgetClause | None = _OPTIONAL
    privacy: PrivacyClause | None = _OPTIONAL

    @model_validator(mode="after")
    def _meets_its_preset(self) -> PolicySection:
        if self.preset is not None:
            for clause in weaker_clauses(self, PRESETS[self.preset]):
                raise ValueError(f"{clause} is weaker than the preset {self.preset} asks for")
        return self

    def changed(self, **clauses: Any) -> PolicySection:
        """The policy with other clauses.

        Raises:
            ManifestError: when it would be weaker than the preset that it names.
        """
        try:
            return PolicySection.model_validate(dict(self) | clauses)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            message = first["msg"].removeprefix("Value error, ")
            raise ManifestError(f"policy: {message}") from None

    def violations(self, parameters: str, about: dict[str, Any]) -> list[str]:
        """What breaks the policy in a model of this parameter set with this `about`.

        Each is one sentence that begins with the clause's name.
        """
        name = "the policy" if self.preset is None else f"the policy {self.preset}"
        found = []
        needed = self.minimum_parameters
        if not PARAMETER_SETS[parameters].at_least(PARAMETER_SETS[needed]):
            found.append(
                f"minimum_parameters: {name} asks for {needed}, the parameter set is below the "
                f"policy's minimum: {parameters}"
            )
        if self.privacy is not None:
            asked = (
                f"{name} asks for a head trained with epsilon at most "
                f"{self.privacy.max_epsilon:g} and delta at most {self.privacy.max_delta:g}"
            )
            stated = about.get("privacy")
            numbers = stated if isinstance(stated, dict) else {}
            epsilon, delta = _number(numbers.get("epsilon")), _number(numbers.get("delta"))
            if epsilon is None or delta is None:
                found.append(f"privacy: {asked}, this one was trained without")
            elif not (epsilon <= self.privacy.max_epsilon and delta <= self.privacy.max_delta):
                found.append(f"privacy: {asked}, this one has {epsilon:g} and {delta:g}")
        return found


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # `about` may hold whole numbers of any length
        return math.inf


class Guard(StrEnum):
    """Who sees to a clause."""

    SERVICE = "enforced by the service"
    PUBLISHING = "checked when the model is published, and by every client that reads the manifest"
    CLIENT = "promised by the client; the service cannot see it"


#: Who sees to each clause. What the service cannot see, it cannot enforce.
GUARDS: Final = MappingProxyType(
    {
        "minimum_parameters": Guard.PUBLISHING,
        "bulk": Guard.SERVICE,
        "deidentify": Guard.CLIENT,
        "query_budget": Guard.SERVICE,
        "privacy": Guard.PUBLISHING,
    }
)


def weaker_clauses(policy: PolicySection, least: PolicySection) -> list[str]:
    """The clauses in which a policy asks for less than another."""
    found = []
    sets = (PARAMETER_SETS[policy.minimum_parameters], PARAMETER_SETS[least.minimum_parameters])
    if not sets[0].at_least(sets[1]):
        found.append("minimum_parameters")
    if policy.bulk and not least.bulk:
        found.append("bulk")
    if least.deidentify and not policy.deidentify:
        found.append("deidentify")
    if least.query_budget is not None and (
        policy.query_budget is None or _a_month(policy.query_budget) > _a_month(least.query_budget)
    ):
        found.append("query_budget")
    if least.privacy is not None and (
        policy.privacy is None
        or policy.privacy.max_epsilon > least.privacy.max_epsilon
        or policy.privacy.max_delta > least.privacy.max_delta
    ):
        found.append("privacy")
    return found


def _a_month(budget: BudgetClause) -> int:
    return budget.units * (31 if budget.period == "day" else 1)


def _clauses(
    minimum_parameters: Literal["standard", "compact"],
    *,
    bulk: bool,
    deidentify: bool,
    a_day: int,
    privacy: PrivacyClause | None = None,
) -> PolicySection:
    return PolicySection(
        minimum_parameters=minimum_parameters,
        bulk=bulk,
        deidentify=deidentify,
        query_budget=BudgetClause(units=a_day, period="day"),
        privacy=privacy,
    )


#: The least that each field asks for; docs/policies.md says why. They are part of the format.
PRESETS: Final = MappingProxyType(
    {
        "medical": _clauses(
            "standard",
            bulk=False,
            deidentify=True,
            a_day=10_000,
            privacy=PrivacyClause(max_epsilon=4.0, max_delta=1e-5),
        ),
        "finance": _clauses(
            "standard",
            bulk=False,
            deidentify=True,
            a_day=100_000,
            privacy=PrivacyClause(max_epsilon=8.0, max_delta=1e-5),
        ),
        "social-media": _clauses("compact", bulk=True, deidentify=True, a_day=1_000_000),
        "network-security": _clauses("compact", bulk=True, deidentify=False, a_day=10_000_000),
        "manufacturing": _clauses("compact", bulk=False, deidentify=False, a_day=10_000),
    }
)


def preset_policy(name: str) -> PolicySection:
    """The policy of a preset, which it names.

    Raises:
        ValueError: when there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"got the policy {name!r}, expected one of {', '.join(PRESETS)}")
    return PolicySection.model_validate(dict(PRESETS[name]) | {"preset": name})
