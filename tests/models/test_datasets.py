from __future__ import annotations

import csv
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veilhead_models import datasets
from veilhead_models.datasets import DATASETS, Dataset, load_dataset, read_table
from veilhead_protocol.errors import DatasetError

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")

SECRET = "patient Jane Doe"


@functools.cache
def published(name: str) -> Dataset:
    return load_dataset(name)


def table(directory: Path, lines: str, name: str = "table.csv") -> Path:
    path = directory / name
    path.write_text(lines, "utf-8")
    return path


def check_sound(dataset: Dataset) -> None:
    """What holds for every data set."""
    for split in (dataset.train, dataset.test):
        assert split.targets.shape == (len(split.texts),)
        assert all(text.strip() == text != "" for text in split.texts)
        assert set(split.targets.tolist()) <= set(range(len(dataset.labels)))
    assert set(dataset.train.targets.tolist()) == set(range(len(dataset.labels)))
    assert len(set(dataset.labels)) == len(dataset.labels)
    trained = {text.casefold() for text in dataset.train.texts}
    assert not trained & {text.casefold() for text in dataset.test.texts}


class TestPublished:
    @pytest.mark.parametrize(
        ("name", "classes", "train", "test"),
        [
            ("icd10-chapters", 22, 14_518, 4_067),
            ("icd10-sections-77", 77, 15_126, 3_578),
            ("icd10-sections-150", 150, 24_021, 5_412),
            ("cfpb", 8, 10_000, 3_000),
            ("vader-movies", 2, 8_455, 2_113),
            ("vader-tweets", 2, 3_357, 824),
            pytest.param("spam-assassin", 2, 4_732, 1_183, marks=needs_npm),
        ],
    )
    def test_rows_are_counted_and_sound(
        self, name: str, classes: int, train: int, test: int
    ) -> None:
        dataset = published(name)
        check_sound(dataset)
        assert dataset.name == name
        assert dataset.license is not None
        counts = len(dataset.labels), len(dataset.train.texts), len(dataset.test.texts)
        assert counts == (classes, train, test)
        assert set(dataset.test.targets.tolist()) == set(range(classes))

    def test_every_name_is_covered_above(self) -> None:
        assert len(DATASETS) == 7

    @pytest.mark.parametrize("name", ["icd10-chapters", "icd10-sections-77"])
    def test_icd10_splits_share_no_category(self, name: str) -> None:
        dataset = published(name)
        categories: dict[str, set[str]] = {}
        for phrase in datasets._icd10_phrases(lambda chapter, section: ""):
            categories.setdefault(phrase.text.casefold(), set()).add(phrase.category)
        trained, tested = (
            [categories[text.casefold()] for text in split.texts]
            for split in (dataset.train, dataset.test)
        )
        # Phrases of one category only say for certain which category they were drawn from.
        train_categories = {code for codes in trained if len(codes) == 1 for code in codes}
        test_categories = {code for codes in tested if len(codes) == 1 for code in codes}
        assert len(test_categories) > 200
        assert not train_categories & test_categories

    def test_icd10_rows_are_capped_and_not_repeated(self) -> None:
        dataset = published("icd10-chapters")
        for split, most in ((dataset.train, 700), (dataset.test, 200)):
            assert np.bincount(split.targets).max() == most
            assert len({text.casefold() for text in split.texts}) == len(split.texts)
        assert len(dataset.test.texts) >= 3_500

    def test_icd10_labels_are_readable(self) -> None:
        chapters = published("icd10-chapters").labels
        assert chapters[1] == "2. Neoplasms"
        assert chapters[3] == "4. Endocrine, nutritional and metabolic diseases"
        assert "C43-C44 Melanoma and other malignant neoplasms of skin" in (
            published("icd10-sections-77").labels
        )

    def test_icd10_phrases_stand_under_their_chapter(self) -> None:
        dataset = published("icd10-chapters")
        rows = {
            text: dataset.labels[target]
            for split in (dataset.train, dataset.test)
            for text, target in zip(split.texts, split.targets, strict=True)
        }
        assert rows["Vitamin A deficiency with keratomalacia"].startswith("4.")

    def test_a_seed_decides_the_split(self) -> None:
        once, again, other = (load_dataset("vader-movies", seed=seed) for seed in (1, 1, 2))
        assert once.test.texts == again.test.texts
        assert set(once.test.texts) != set(other.test.texts)

    def test_a_sample_is_of_the_rows(self) -> None:
        dataset = published("vader-tweets")
        sample = dataset.sample(50, 20)
        assert (len(sample.train.texts), len(sample.test.texts)) == (50, 20)
        assert sample.train.targets.shape == (50,)
        rows = set(zip(dataset.train.texts, dataset.train.targets.tolist(), strict=True))
        assert set(zip(sample.train.texts, sample.train.targets.tolist(), strict=True)) <= rows
        assert dataset.sample(10**6, 10**6).test.texts == dataset.test.texts
        chapters = published("icd10-chapters").sample(70, 70)
        for split in (chapters.train, chapters.test):
            assert np.bincount(split.targets, minlength=22).min() == 3

    def test_valence_decides_the_label(self) -> None:
        dataset = load_dataset("vader-movies")
        rows = dict(zip(dataset.train.texts, dataset.train.targets.tolist(), strict=True)) | dict(
            zip(dataset.test.texts, dataset.test.targets.tolist(), strict=True)
        )
        assert dataset.labels[rows["Effective but too tepid biopic"]] == "negative"

    def test_tweets_are_read_as_their_authors_wrote_them(self) -> None:
        dataset = published("vader-tweets")
        assert not any("&amp;" in text for text in dataset.train.texts)


class TestOwnTables:
    def test_csv_and_jsonl_give_the_same_splits(self, tmp_path: Path) -> None:
        rows = [
            (f"text {number}, quoted\nover lines", f"label {number % 3}") for number in range(60)
        ]
        with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([("words", "class"), *rows])
        (tmp_path / "t.jsonl").write_text(
            "".join(json.dumps({"class": label, "words": text}) + "\n\n" for text, label in rows)
        )
        found = [
            load_dataset(tmp_path / name, text="words", label="class")
            for name in ("t.csv", "t.jsonl")
        ]
        assert found[0].train.texts == found[1].train.texts
        assert found[0].test.texts == found[1].test.texts
        assert found[0].labels == ("label 0", "label 1", "label 2")
        assert np.bincount(found[0].test.targets).tolist() == [4, 4, 4]
        assert found[0].license is None
        assert "quoted" not in repr(found[0])

    @settings(max_examples=50, deadline=None)
    @given(
        labels=st.lists(st.integers(0, 4), min_size=10, max_size=80).filter(
            lambda found: len(set(found)) > 1
        ),
        seed=st.integers(0, 100),
    )
    def test_every_label_is_held_out_in_proportion(self, labels: list[int], seed: int) -> None:
        rows = [(f"text {number}", str(label)) for number, label in enumerate(labels)]
        dataset = datasets._split_rows("rows", rows, seed=seed, source="here", terms=None)
        check_sound(dataset)
        assert sorted(dataset.train.texts + dataset.test.texts) == sorted(text for text, _ in rows)
        for index, label in enumerate(dataset.labels):
            count = labels.count(int(label))
            held_out = int((dataset.test.targets == index).sum())
            assert held_out == (max(1, round(count * 0.2)) if count > 1 else 0)

    def test_a_text_that_is_trained_on_is_not_tested_on(self, tmp_path: Path) -> None:
        lines = "".join(f"{word},{label}\n" for word in ("Same", "same", "other") for label in "ab")
        path = table(tmp_path, "t,l\n" + lines * 5)
        with pytest.raises(DatasetError, match="too few distinct texts"):
            load_dataset(path, text="t", label="l")

    def test_integers_are_labels_in_json(self, tmp_path: Path) -> None:
        lines = "".join(json.dumps({"t": f"text {n}", "l": n % 2}) + "\n" for n in range(10))
        path = table(tmp_path, lines, "t.ndjson")
        assert load_dataset(path, text="t", label="l").labels == ("0", "1")

    def test_one_column_can_be_read_alone(self, tmp_path: Path) -> None:
        path = table(tmp_path, "a,b\n1,\n 2 ,\n")
        assert read_table(path, ["a"]) == {"a": ("1", "2")}

    @pytest.mark.parametrize(
        ("name", "lines", "message"),
        [
            ("t.csv", "text,other\nx,y\n", "0 columns 'label'"),
            ("t.csv", "text,label,label\nx,y,z\n", "2 columns 'label'"),
            ("t.csv", "", "0 columns 'text'"),
            ("t.csv", "text,label\n", "no rows"),
            ("t.csv", f"text,label\nx,y\n{SECRET},\n", "row 3, column 'label': got nothing"),
            ("t.csv", f"text,label\n \t,{SECRET}\n", "row 2, column 'text': got no text"),
            ("t.csv", f"text,label\nx,y\n{SECRET},b,c\n", "row 3: got 3 columns, expected 2"),
            ("t.csv", f"text,label\nx,y\n{SECRET}\n", "row 3: got 1 columns"),
            ("t.csv", f'text,label\nx,y\n"{SECRET}"x,y\n', "row 3: not CSV"),
            ("t.csv", f"text,label\n{SECRET},one\nother,one\n", "1 label, expected at least 2"),
            ("t.jsonl", f'{{"text": "x", "label": "y"}}\n{SECRET}\n', "row 2: expected a JSON"),
            ("t.jsonl", f'["{SECRET}"]\n', "row 1: expected a JSON"),
            ("t.jsonl", f'\n{{"text": "{SECRET}"}}\n', "row 2: has no column 'label'"),
            ("t.jsonl", f'{{"text": "{SECRET}", "label": null}}\n', "column 'label': got nothing"),
            ("t.jsonl", f'{{"text": ["{SECRET}"], "label": "y"}}\n', "column 'text': got no text"),
            ("t.jsonl", f'{{"text": "{SECRET}", "label": true}}\n', "column 'label': got no text"),
            ("t.jsonl", "", "no rows"),
        ],
    )
    def test_a_wrong_table_is_told_without_its_content(
        self, tmp_path: Path, name: str, lines: str, message: str
    ) -> None:
        path = table(tmp_path, lines, name)
        with pytest.raises(DatasetError) as caught:
            load_dataset(path, text="text", label="label")
        assert message in str(caught.value)
        assert path.stem in str(caught.value)
        assert "Jane" not in str(caught.value)

    def test_a_file_that_cannot_be_read_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"gone\.csv cannot be read"):
            load_dataset(tmp_path / "gone.csv", text="t", label="l")
        (tmp_path / "latin.csv").write_bytes("text,label\ncaf\xe9,b\n".encode("latin-1"))
        with pytest.raises(DatasetError, match=r"latin\.csv is not UTF-8"):
            load_dataset(tmp_path / "latin.csv", text="text", label="label")

    def test_names_and_columns_are_asked_for(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"icd10-chapters.*or a file"):
            load_dataset("icd-10")
        with pytest.raises(DatasetError, match="two columns"):
            load_dataset(tmp_path / "t.csv", text="t")
        with pytest.raises(DatasetError, match="columns are for files"):
            load_dataset("cfpb", text="t", label="l")
