"""What a token head finds, entity by entity.

Matches are counted by `nervaluate`, as SemEval 2013 task 9 defines them: *exact* where place and
kind are both right, *overlapping* where the kind is right and the places share something.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from veilhead_models.records import Entity
from veilhead_protocol.errors import DatasetError, ModelError


@dataclass(frozen=True)
class Scores:
    """Precision, recall and F1; a score with nothing to divide by is 0."""

    precision: float
    recall: float
    f1: float

    @classmethod
    def of_counts(cls, right: int, found: int, support: int) -> Scores:
        """The scores of so many right ones among those found and those that there are."""
        return cls(
            precision=right / found if found else 0.0,
            recall=right / support if support else 0.0,
            f1=2 * right / (found + support) if found + support else 0.0,
        )

    @classmethod
    def mean(cls, scores: Iterable[Scores]) -> Scores:
        """The mean of each; F1 is the mean of F1."""
        means = np.mean([(one.precision, one.recall, one.f1) for one in scores], axis=0)
        return cls(*means.tolist())


@dataclass(frozen=True)
class EntityScores:
    """Scores of one kind of entity.

    Attributes:
        label: the kind.
        support: entities that there are.
        found: entities that were answered.
        exact: of these, such as are right in place and kind.
        overlapping: of these, such as share a place with an entity of their kind.
        scores: by exact matches.
        relaxed: by overlapping ones.
    """

    label: str
    support: int
    found: int
    exact: int
    overlapping: int
    scores: Scores
    relaxed: Scores


@dataclass(frozen=True)
class EntityReport:
    """What a token head scores on records that it was not trained on.

    Attributes:
        train_records: records it was trained on.
        test_records: records it is judged by.
        micro: scores over all entities.
        macro: means over kinds.
        micro_relaxed: as `micro`, by overlapping matches.
        macro_relaxed: as `macro`, by overlapping matches.
        entities: scores by kind.
    """

    train_records: int
    test_records: int
    micro: Scores
    macro: Scores
    micro_relaxed: Scores
    macro_relaxed: Scores
    entities: tuple[EntityScores, ...]

    @classmethod
    def of_entities(
        cls,
        expected: Sequence[Sequence[Entity]],
        answered: Sequence[Sequence[Entity]],
        labels: Sequence[str],
        *,
        train_records: int,
    ) -> EntityReport:
        """The report of what was answered for each record, of these kinds.

        Raises:
            DatasetError: when there are no records, or not as many answers.
            ModelError: when nervaluate is not installed.
        """
        if not expected or len(expected) != len(answered):
            raise DatasetError(
                f"got answers for {len(answered)} of {len(expected)} records, expected one for "
                "each, and at least one record"
            )
        try:
            from nervaluate import Evaluator
        except ImportError as error:
            raise ModelError(
                "the report needs nervaluate, which is not installed: pip install 'veilhead[train]'"
            ) from error
        evaluator = Evaluator(_counted(expected), _counted(answered), list(labels), loader="dict")
        matches = evaluator.evaluate()["entities"]
        kinds = []
        for label in labels:
            support = _number(expected, label)
            found = _number(answered, label)
            by_rule = matches.get(label)  # none where nobody names the kind
            exact = by_rule["strict"].correct if by_rule else 0
            overlapping = by_rule["ent_type"].correct if by_rule else 0
            kinds.append(
                EntityScores(
                    label=label,
                    support=support,
                    found=found,
                    exact=exact,
                    overlapping=overlapping,
                    scores=Scores.of_counts(exact, found, support),
                    relaxed=Scores.of_counts(overlapping, found, support),
                )
            )
        found = sum(one.found for one in kinds)
        support = sum(one.support for one in kinds)
        return cls(
            train_records=train_records,
            test_records=len(expected),
            micro=Scores.of_counts(sum(one.exact for one in kinds), found, support),
            macro=Scores.mean(one.scores for one in kinds),
            micro_relaxed=Scores.of_counts(sum(one.overlapping for one in kinds), found, support),
            macro_relaxed=Scores.mean(one.relaxed for one in kinds),
            entities=tuple(kinds),
        )

    def to_json(self) -> dict[str, Any]:
        """The report as something that JSON can carry."""
        return asdict(self)

    def render(self) -> str:
        """The report as a table for a terminal, without a newline at its end."""
        width = min(46, max(len("entities"), *(len(one.label) for one in self.entities)))

        def line(name: str, scores: Scores, relaxed: Scores, support: str, found: str) -> str:
            name = name if len(name) <= width else name[: width - 3] + "..."
            return (
                f"{name:<{width}}  {scores.precision:9.3f}  {scores.recall:6.3f}  "
                f"{scores.f1:6.3f}  {relaxed.f1:10.3f}  {support:>8}  {found:>5}"
            ).rstrip()

        support = str(sum(one.support for one in self.entities))
        found = str(sum(one.found for one in self.entities))
        return "\n".join(
            [
                f"entity-level scores on {self.test_records} held-out records",
                f"trained on {self.train_records} records",
                "",
                f"{'entities':<{width}}  precision  recall      f1  overlap f1  entities  found",
                *(
                    line(one.label, one.scores, one.relaxed, str(one.support), str(one.found))
                    for one in self.entities
                ),
                line("micro", self.micro, self.micro_relaxed, support, found),
                line("macro", self.macro, self.macro_relaxed, "", ""),
            ]
        )


def _counted(records: Sequence[Sequence[Entity]]) -> list[list[dict[str, Any]]]:
    """Entities as nervaluate wants them: their last character is one of theirs."""
    return [
        [{"label": one.label, "start": one.start, "end": one.end - 1} for one in entities]
        for entities in records
    ]


def _number(records: Sequence[Sequence[Entity]], label: str) -> int:
    return sum(one.label == label for entities in records for one in entities)
