"""Logits of tokens -> entities, in the shapes of the transformers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from veilhead.predictions import scores

if TYPE_CHECKING:
    from veilhead_models.embedder import Token

#: How tokens become entities; the names are those of the transformers pipeline.
AggregationStrategy = Literal["none", "simple", "first", "average", "max"]

#: What the transformers pipeline gives: `entity` (a token's label) with `index`, or `entity_group`
#: (of tokens that belong together), and `score`, `word`, `start` and `end`.
Entity = dict[str, Any]

#: The tokens of each window of a text, and their logits [tokens, C].
TokenLogits = Sequence[tuple[Sequence["Token"], NDArray[np.float64]]]

_STRATEGIES: Final = get_args(AggregationStrategy)


@dataclass(frozen=True)
class _Labelled:
    """A token or a word with its label."""

    label: str
    score: float
    pieces: tuple[str, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TokenShape:
    """How tokens become entities.

    Attributes:
        labels: the labels, in the order of the logits.
        strategy: which tokens are taken together, and whose label they get.
        ignored: labels that are left out.
        stride: tokens by which the windows of a long text overlap; None cuts it.
    """

    labels: tuple[str, ...]
    strategy: AggregationStrategy
    ignored: frozenset[str]
    stride: int | None

    @classmethod
    def of(
        cls,
        labels: tuple[str, ...],
        strategy: AggregationStrategy,
        ignored: Sequence[str],
        stride: int | None,
    ) -> TokenShape:
        """The shape that a caller asked for.

        Raises:
            ValueError: when the strategy is not one, or cannot go with a stride.
        """
        if strategy not in _STRATEGIES:
            raise ValueError(
                f"aggregation_strategy must be one of {', '.join(_STRATEGIES)}, got {strategy!r}"
            )
        if stride is not None and strategy == "none":
            raise ValueError("a stride needs an aggregation_strategy other than 'none'")
        return cls(labels, strategy, frozenset(ignored), stride)

    def entities(
        self,
        windows: TokenLogits,
        join: Callable[[Sequence[str]], str],
    ) -> list[Entity]:
        """The entities of one text, in its order.

        Args:
            windows: the tokens of each window of the text, and their logits [tokens, C].
            join: makes the text of pieces of the vocabulary.
        """
        found = [
            entity
            for tokens, logits in windows
            for entity in self._of_window(tokens, scores(logits, "softmax"), join)
            if entity.get("entity", entity.get("entity_group")) not in self.ignored
        ]
        return list(_without_overlaps(found)) if len(windows) > 1 else found

    def _of_window(
        self,
        tokens: Sequence[Token],
        probabilities: NDArray[np.float64],
        join: Callable[[Sequence[str]], str],
    ) -> list[Entity]:
        if self.strategy == "none":
            return [
                {
                    "entity": self.labels[row.argmax()],
                    "score": float(row.max()),
                    "index": token.index,
                    "word": token.piece,
                    "start": token.start,
                    "end": token.end,
                }
                for token, row in zip(tokens, probabilities, strict=True)
            ]
        labelled = [
            self._labelled(rows, probabilities, tokens, join) for rows in self._words(tokens)
        ]
        return [_group(group, join) for group in _groups(labelled)]

    def _words(self, tokens: Sequence[Token]) -> list[list[int]]:
        """Places of tokens that get one label."""
        words: list[list[int]] = []
        for place, token in enumerate(tokens):
            if words and token.continues and self.strategy != "simple":
                words[-1].append(place)
            else:
                words.append([place])
        return words

    def _labelled(
        self,
        places: list[int],
        probabilities: NDArray[np.float64],
        tokens: Sequence[Token],
        join: Callable[[Sequence[str]], str],
    ) -> _Labelled:
        rows = probabilities[places]  # [tokens of the word, C]
        if self.strategy == "average":
            row = rows.mean(axis=0)
        elif self.strategy == "max":
            row = rows[rows.max(axis=1).argmax()]
        else:
            row = rows[0]
        pieces = tuple(tokens[place].piece for place in places)
        return _Labelled(
            label=self.labels[row.argmax()],
            score=float(row.max()),
            pieces=pieces if self.strategy == "simple" else (join(pieces),),
            start=tokens[places[0]].start,
            end=tokens[places[-1]].end,
        )


def _groups(labelled: Sequence[_Labelled]) -> Iterator[list[_Labelled]]:
    """Neighbours with one label; `B-` begins a group, `I-` goes on with it."""
    group: list[_Labelled] = []
    for item in labelled:
        if group and (item.label.startswith("B-") or _tag(item) != _tag(group[-1])):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _tag(item: _Labelled) -> str:
    return item.label[2:] if item.label.startswith(("B-", "I-")) else item.label


def _group(group: Sequence[_Labelled], join: Callable[[Sequence[str]], str]) -> Entity:
    return {
        "entity_group": group[0].label.split("-", 1)[-1],
        "score": float(np.mean([item.score for item in group])),
        "word": join([piece for item in group for piece in item.pieces]),
        "start": group[0].start,
        "end": group[-1].end,
    }


def _without_overlaps(entities: Sequence[Entity]) -> Iterator[Entity]:
    """Of entities that two windows saw both, the longest, and of equal ones the surest."""
    best: Entity | None = None
    for entity in sorted(entities, key=lambda found: int(found["start"])):
        if best is not None and entity["start"] < best["end"]:
            best = max(
                best, entity, key=lambda found: (found["end"] - found["start"], found["score"])
            )
            continue
        if best is not None:
            yield best
        best = entity
    if best is not None:
        yield best


def _weight(entity: Entity) -> tuple[int, float]:
    return entity["end"] - entity["start"], entity["score"]
