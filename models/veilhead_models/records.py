"""Records: texts in which values of known kinds are marked, and what tokens say of them.

A file has one JSON object a line: `{"text": ..., "entities": [{"start", "end", "label"}, ...]}`,
with places in characters. Tokens of an entity are tagged `I-label`, and others `O`. First tokens
have no tag of their own, as there are few of them to learn from; two entities of one label are one
where no token stands between them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from veilhead_models.datasets import SPLIT_SEED, held_out_count, rank
from veilhead_models.embedder import Token
from veilhead_protocol.errors import DatasetError

#: The tag of a token outside of every entity.
OUTSIDE: Final = "O"

RECORD_SUFFIXES: Final = (".jsonl", ".ndjson")


@dataclass(frozen=True, order=True)
class Entity:
    """A marked place of a text.

    Attributes:
        start: where it begins, in characters.
        end: where it ends.
        label: what kind of value it is.
    """

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class Record:
    """A text and its entities, in the order of the text and without overlaps."""

    text: str
    entities: tuple[Entity, ...]

    def __repr__(self) -> str:  # texts may be confidential
        return f"Record(entities={len(self.entities)})"


@dataclass(frozen=True)
class RecordDataset:
    """Records in two splits that share no text.

    Attributes:
        train: what heads are trained on.
        test: what they are judged by.
        labels: kinds of entities, of both splits.
    """

    train: tuple[Record, ...]
    test: tuple[Record, ...]
    labels: tuple[str, ...]

    def __repr__(self) -> str:
        return f"RecordDataset(train={len(self.train)}, test={len(self.test)})"

    @classmethod
    def of(cls, train: Sequence[Record], test: Sequence[Record]) -> RecordDataset:
        """The data set of two splits; texts that were trained on are left out of the second.

        Raises:
            DatasetError: when a split is then empty, or there is no entity.
        """
        seen = {record.text.casefold() for record in train}
        unseen = tuple(record for record in test if record.text.casefold() not in seen)
        if not seen or not unseen:
            raise DatasetError(
                f"got {len(seen)} records to train on and {len(unseen)} others to judge by, "
                "expected at least one of each"
            )
        labels = {entity.label for record in (*train, *unseen) for entity in record.entities}
        if not labels:
            raise DatasetError("no record has an entity, expected some to be marked")
        return cls(tuple(train), unseen, tuple(sorted(labels)))


def load_records(path: str | Path, *, seed: int = SPLIT_SEED) -> RecordDataset:
    """The records of a file; which are held out depends on the seed and their order alone.

    Raises:
        DatasetError: as `read_records` and `RecordDataset.of` do.
    """
    records = read_records(path)
    ordered = sorted(range(len(records)), key=lambda row: rank(seed, row))
    chosen = set(ordered[: held_out_count(len(records))])
    return RecordDataset.of(
        [record for row, record in enumerate(records) if row not in chosen],
        [record for row, record in enumerate(records) if row in chosen],
    )


def read_records(path: str | Path) -> tuple[Record, ...]:
    """The records of a file, in its order.

    Raises:
        DatasetError: naming file, line and entity, and never quoting a value.
    """
    source = Path(path)
    if source.suffix.lower() not in RECORD_SUFFIXES:
        raise DatasetError(
            f"{source} is no file of records: expected one that ends in "
            f"{' or '.join(RECORD_SUFFIXES)}"
        )
    records: list[Record] = []
    try:
        with source.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    records.append(_record(line, f"{source}, line {number}"))
    except OSError as error:
        raise DatasetError(f"{source} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError:
        raise DatasetError(f"{source} is not UTF-8: save it as UTF-8") from None
    if not records:
        raise DatasetError(f"{source} has no records")
    return tuple(records)


def write_records(path: str | Path, records: Sequence[Record]) -> None:
    """Write records as `read_records` reads them.

    Raises:
        DatasetError: when the file cannot be written.
    """
    lines = [
        json.dumps(
            {
                "text": record.text,
                "entities": [
                    {"start": found.start, "end": found.end, "label": found.label}
                    for found in record.entities
                ],
            },
            ensure_ascii=False,
        )
        for record in records
    ]
    try:
        Path(path).write_text("\n".join(lines) + "\n", "utf-8")
    except OSError as error:
        raise DatasetError(f"{path} cannot be written ({error.strerror})") from error


def tags_of(labels: Sequence[str]) -> tuple[str, ...]:
    """The tags of tokens, in the order of a head's rows."""
    return (OUTSIDE, *(f"I-{label}" for label in labels))


def tag_tokens(
    tokens: Sequence[Token], entities: Sequence[Entity], tags: Sequence[str]
) -> NDArray[np.intp]:
    """The tag of every token, by number: [tokens].

    A token that an entity covers in part belongs to it.
    """
    number = {tag: index for index, tag in enumerate(tags)}
    found = np.zeros(len(tokens), dtype=np.intp)
    for place, token in enumerate(tokens):
        for entity in entities:
            if token.start < entity.end and entity.start < token.end:
                found[place] = number[f"I-{entity.label}"]
    return found


def tagged_entities(
    tokens: Sequence[Token], logits: NDArray[np.float64], tags: Sequence[str]
) -> Iterator[Entity]:
    """The entities that logits [tokens, C] stand for, as clients read them (`average`).

    A word has the tag of its tokens' mean probabilities. Neighbours with one tag are one entity.
    """
    if not tokens:
        return
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)  # [tokens, C]
    starts = [place for place, token in enumerate(tokens) if not (place and token.continues)]
    ends = [*starts[1:], len(tokens)]
    words = zip(starts, ends, strict=True)
    found = [
        (tags[probabilities[start:end].mean(axis=0).argmax()], start, end) for start, end in words
    ]
    for tag, group in groupby(found, key=lambda word: word[0]):
        if tag != OUTSIDE:
            places = list(group)
            first, last = tokens[places[0][1]], tokens[places[-1][2] - 1]
            yield Entity(first.start, last.end, tag.partition("-")[2])


def _record(line: str, where: str) -> Record:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not {"text", "entities"} <= set(found):
        raise DatasetError(
            f'{where}: expected a JSON object with "text" and "entities" on one line'
        )
    text, entities = found["text"], found["entities"]
    if not isinstance(text, str) or not text.strip():
        raise DatasetError(f'{where}: "text" is no text, or blank')
    if not isinstance(entities, list):
        raise DatasetError(f'{where}: "entities" is no list; a record without any has an empty one')
    marked = sorted(
        _entity(item, len(text), f"{where}, entity {number}")
        for number, item in enumerate(entities, start=1)
    )
    for one, other in pairwise(marked):
        if other.start < one.end:
            raise DatasetError(
                f"{where}: the entities at {one.start} and {other.start} overlap; a character "
                "belongs to one at most"
            )
    return Record(text, tuple(marked))


def _entity(item: Any, length: int, where: str) -> Entity:
    """An entity of a text of so many characters."""
    start, end, label = (
        (item.get(name) for name in ("start", "end", "label"))
        if isinstance(item, dict)
        else (None, None, None)
    )
    if type(start) is not int or type(end) is not int:  # a boolean is an int, too
        raise DatasetError(f'{where}: expected whole numbers as "start" and "end"')
    if not 0 <= start < end <= length:
        raise DatasetError(
            f"{where}: got places {start} to {end} in a text of {length} characters, expected "
            "0 <= start < end <= the number of characters"
        )
    if not isinstance(label, str) or not label.strip():
        raise DatasetError(f'{where}: expected a "label" that is a text and not blank')
    if label.startswith(("B-", "I-")):
        raise DatasetError(f'{where}: give the kind alone as "label", without B- or I-')
    return Entity(start, end, label)
