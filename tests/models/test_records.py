"""Records: files of them, tags of tokens, and the report of what was found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veilhead.tokens import TokenShape
from veilhead_models.embedder import Token
from veilhead_models.entity_report import EntityReport
from veilhead_models.records import (
    Entity,
    Record,
    RecordDataset,
    load_records,
    read_records,
    tag_tokens,
    tagged_entities,
    tags_of,
    write_records,
)
from veilhead_protocol.errors import DatasetError

TAGS = tags_of(("CITY", "NAME"))


def record(text: str, *entities: tuple[int, int, str]) -> Record:
    return Record(text, tuple(Entity(*one) for one in entities))


def tokens_of(text: str) -> list[Token]:
    """Two characters make a token, as far as a word goes."""
    tokens: list[Token] = []
    start = 0
    for word in text.split(" "):
        for place in range(0, len(word), 2):
            piece = word[place : place + 2]
            begin = start + place
            tokens.append(Token(piece, len(tokens), begin, begin + len(piece), place > 0))
        start += len(word) + 1
    return tokens


class TestFiles:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        made = [
            record("Ann in 大阪", (0, 3, "NAME"), (7, 9, "CITY")),
            record("nothing\n\u2028here"),
        ]
        write_records(tmp_path / "a.jsonl", made)
        assert read_records(tmp_path / "a.jsonl") == tuple(made)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("[]", 'expected a JSON object with "text" and "entities"'),
            ('{"text": "secret"', "expected a JSON object"),
            ({"text": "secret"}, "expected a JSON object"),
            ({"text": 3, "entities": []}, '"text" is no text'),
            ({"text": "  ", "entities": []}, '"text" is no text, or blank'),
            ({"text": "secret", "entities": {}}, '"entities" is no list'),
            ({"text": "secret", "entities": ["secret"]}, "entity 1: expected whole numbers"),
            (
                {"text": "secret", "entities": [{"start": 0, "end": True, "label": "X"}]},
                "entity 1: expected whole numbers",
            ),
            (
                {"text": "secret", "entities": [{"start": 0, "end": 1.0, "label": "X"}]},
                "entity 1: expected whole numbers",
            ),
            (
                {"text": "secret", "entities": [{"start": 2, "end": 2, "label": "X"}]},
                "got places 2 to 2 in a text of 6 characters",
            ),
            (
                {"text": "secret", "entities": [{"start": -1, "end": 2, "label": "X"}]},
                "got places -1 to 2",
            ),
            (
                {"text": "secret", "entities": [{"start": 0, "end": 7, "label": "X"}]},
                "got places 0 to 7",
            ),
            (
                {"text": "secret", "entities": [{"start": 0, "end": 2, "label": " "}]},
                'expected a "label"',
            ),
            (
                {"text": "secret", "entities": [{"start": 0, "end": 2, "label": "B-X"}]},
                "without B- or I-",
            ),
            (
                {
                    "text": "secret",
                    "entities": [
                        {"start": 3, "end": 6, "label": "X"},
                        {"start": 0, "end": 4, "label": "Y"},
                    ],
                },
                "the entities at 0 and 3 overlap",
            ),
        ],
    )
    def test_a_wrong_line_is_named_and_not_quoted(
        self, tmp_path: Path, line: object, message: str
    ) -> None:
        good = json.dumps({"text": "fine", "entities": []})
        bad = line if isinstance(line, str) else json.dumps(line)
        file = tmp_path / "a.jsonl"
        file.write_text(f"{good}\n\n{bad}\n")
        with pytest.raises(DatasetError) as raised:
            read_records(file)
        assert f"{file}, line 3" in str(raised.value)
        assert message in str(raised.value)
        assert "secret" not in str(raised.value)

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        (tmp_path / "empty.jsonl").write_text("\n")
        (tmp_path / "bytes.jsonl").write_bytes(b"\xff\n")
        for name, message in (
            ("a.csv", "ends in .jsonl"),
            ("absent.jsonl", "cannot be read"),
            ("empty.jsonl", "has no records"),
            ("bytes.jsonl", "not UTF-8"),
        ):
            with pytest.raises(DatasetError, match=message):
                read_records(tmp_path / name)

    def test_splits_share_no_text_and_depend_on_the_order_alone(self, tmp_path: Path) -> None:
        made = [record(f"Ann {n % 40}", (0, 3, "NAME")) for n in range(50)]
        write_records(tmp_path / "a.jsonl", made)
        one, other = (load_records(tmp_path / "a.jsonl") for _ in range(2))
        assert one == other
        assert one.labels == ("NAME",)
        assert {found.text for found in one.train}.isdisjoint(found.text for found in one.test)
        assert len(one.train) == 40
        assert 0 < len(one.test) <= 10
        assert "Ann" not in repr(one) + repr(one.train[0])

    def test_splits_that_are_none(self) -> None:
        ann = record("Ann", (0, 3, "NAME"))
        with pytest.raises(DatasetError, match="1 records to train on and 0 others"):
            RecordDataset.of([ann], [record("ANN", (0, 3, "NAME"))])
        with pytest.raises(DatasetError, match="no record has an entity"):
            RecordDataset.of([record("a")], [record("b")])


class TestTags:
    def test_an_entity_takes_the_tokens_that_it_touches(self) -> None:
        text = "Annabel Bo in Oslo"
        entities = record(text, (0, 7, "NAME"), (8, 10, "NAME"), (15, 18, "CITY")).entities
        numbers = tag_tokens(tokens_of(text), entities, TAGS)
        assert [TAGS[number] for number in numbers] == [
            *["I-NAME"] * 5,
            *("O", "I-CITY", "I-CITY"),
        ]

    @settings(max_examples=60, deadline=None)
    @given(
        words=st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["CITY", "NAME"])), min_size=1)
    )
    def test_entities_of_whole_words_come_back(self, words: list[tuple[int, str]]) -> None:
        text, entities = "", []
        for place, (length, label) in enumerate(words):
            start = len(text) + (1 if text else 0)
            text += (" " if text else "") + "x" * length
            if place % 2:  # with a word between them
                entities.append(Entity(start, len(text), label))
        tokens = tokens_of(text)
        logits = 30 * np.eye(len(TAGS))[tag_tokens(tokens, entities, TAGS)]
        assert list(tagged_entities(tokens, logits, TAGS)) == entities

    @settings(max_examples=60, deadline=None)
    @given(count=st.integers(0, 20), seed=st.integers(0, 2**32 - 1))
    def test_answers_are_read_as_clients_read_them(self, count: int, seed: int) -> None:
        tokens = tokens_of("abcd ef ghij klmnop qr st " * 3)[:count]
        logits = 2 * np.random.default_rng(seed).normal(size=(count, len(TAGS)))
        shape = TokenShape.of(TAGS, "average", ["O"], None)
        theirs = shape.entities([(tokens, logits)], " ".join)
        ours = list(tagged_entities(tokens, logits, TAGS))
        assert ours == [Entity(one["start"], one["end"], one["entity_group"]) for one in theirs]


class TestReport:
    def test_it_counts_exact_and_overlapping_matches_by_kind(self) -> None:
        name, city = "NAME", "CITY"
        expected = [
            [Entity(0, 3, name), Entity(5, 9, name), Entity(12, 20, city)],
            [Entity(4, 8, city)],
            [],
        ]
        answered = [
            [Entity(0, 3, name), Entity(5, 7, name), Entity(12, 20, name)],  # right, cut, wrong
            [Entity(8, 12, city)],  # beside it
            [Entity(0, 2, name)],
        ]
        report = EntityReport.of_entities(
            expected, answered, (city, name, "NEVER"), train_records=7
        )
        by_kind = {one.label: one for one in report.entities}
        counts = {
            label: (one.support, one.found, one.exact, one.overlapping)
            for label, one in by_kind.items()
        }
        assert counts == {name: (2, 4, 1, 2), city: (2, 1, 0, 0), "NEVER": (0, 0, 0, 0)}
        scores = by_kind[name].scores
        assert (scores.precision, scores.recall) == (0.25, 0.5)
        assert scores.f1 == pytest.approx(1 / 3)
        assert by_kind[name].relaxed.recall == 1.0
        assert report.micro.precision == pytest.approx(1 / 5)
        assert report.micro.recall == pytest.approx(1 / 4)
        assert report.micro_relaxed.f1 == pytest.approx(2 * 2 / (5 + 4))
        assert report.macro.f1 == pytest.approx(1 / 9)
        assert (report.train_records, report.test_records) == (7, 3)
        assert "micro" in report.render()
        assert json.loads(json.dumps(report.to_json()))["entities"][1]["exact"] == 1

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.lists(st.sampled_from(TAGS), min_size=8, max_size=8),
                st.lists(st.sampled_from(TAGS), min_size=8, max_size=8),
            ),
            min_size=1,
            max_size=4,
        )
    )
    def test_exact_matches_are_those_that_both_sides_name(
        self, pairs: list[tuple[list[str], list[str]]]
    ) -> None:
        tokens = tokens_of("ab cd ef gh ij kl mn op")

        def entities(tags: list[str]) -> list[Entity]:
            logits = np.eye(len(TAGS))[[TAGS.index(tag) for tag in tags]]
            return list(tagged_entities(tokens, logits, TAGS))

        expected = [entities(tags) for tags, _ in pairs]
        answered = [entities(tags) for _, tags in pairs]
        report = EntityReport.of_entities(expected, answered, ("CITY", "NAME"), train_records=1)
        both = sum(len(set(a) & set(b)) for a, b in zip(expected, answered, strict=True))
        assert sum(one.exact for one in report.entities) == both
        assert all(one.exact <= one.overlapping <= one.found for one in report.entities)

    def test_nothing_to_judge_by_is_refused(self) -> None:
        with pytest.raises(DatasetError, match="0 of 0 records"):
            EntityReport.of_entities([], [], ("NAME",), train_records=1)
