"""How good a model is on labelled texts: accuracy, and precision, recall and F1 of every label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LabelScore:
    """One label's scores; 0 where a ratio has no denominator."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Evaluation:
    """Accuracy over the texts that were answered, and the scores of every label that occurs."""

    answered: int
    failed: int
    accuracy: float
    labels: tuple[LabelScore, ...]


def evaluate(truth: Sequence[str], answers: Sequence[str | None]) -> Evaluation:
    """Scores of answers against the true labels; None is a text that was not answered."""
    pairs = [(right, got) for right, got in zip(truth, answers, strict=True) if got is not None]
    scores = []
    for label in sorted({name for pair in pairs for name in pair}):
        hits = sum(right == got == label for right, got in pairs)
        given = sum(got == label for _, got in pairs)
        support = sum(right == label for right, _ in pairs)
        scores.append(
            LabelScore(
                label=label,
                precision=hits / given if given else 0.0,
                recall=hits / support if support else 0.0,
                f1=2 * hits / (given + support),
                support=support,
            )
        )
    correct = sum(right == got for right, got in pairs)
    return Evaluation(
        answered=len(pairs),
        failed=len(answers) - len(pairs),
        accuracy=correct / len(pairs) if pairs else 0.0,
        labels=tuple(scores),
    )
