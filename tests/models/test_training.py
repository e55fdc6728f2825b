from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
)
from support.backbones import WORDS
from support.checkpoints import save_checkpoint

from veilhead_models.artifact import MANIFEST_FILE, REPORT_FILE, HeadArtifact
from veilhead_models.backbone import Backbone, describe, minilm, open_backbone
from veilhead_models.datasets import Dataset, Split, load_dataset
from veilhead_models.hf_import import import_hf
from veilhead_models.training import (
    INVERSE_PENALTY,
    TrainingReport,
    train_artifact,
    train_head,
)
from veilhead_protocol.errors import BackboneError, DatasetError, ManifestError, ModelError
from veilhead_protocol.scales import project


def made_up(classes: int, *, terms: str | None = "MIT") -> Dataset:
    """Texts whose class is the place of their first word, with some noise."""
    generator = np.random.default_rng(0)

    def split(rows: int) -> Split:
        targets = generator.integers(0, classes, rows)
        texts = [
            " ".join([WORDS[target], *generator.choice(WORDS, 3)]) for target in targets.tolist()
        ]
        return Split(texts=tuple(texts), targets=targets.astype(np.intp))

    labels = tuple(f"about {word}" for word in WORDS[:classes])
    return Dataset("made-up", split(300), split(80), labels, "here", terms)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


class TestReport:
    @settings(max_examples=40, deadline=None)
    @given(classes=st.integers(2, 6), rows=st.integers(1, 60), seed=st.integers(0, 2**32 - 1))
    def test_its_numbers_are_scikit_learns(self, classes: int, rows: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        logits = 3 * generator.normal(size=(rows, classes))
        targets = generator.integers(0, classes, rows).astype(np.intp)
        labels = [str(number) for number in range(classes)]
        report = TrainingReport.of_logits(logits, targets, labels, train_rows=1)
        answers, probabilities = logits.argmax(axis=1), softmax(logits)
        everyone = range(classes)
        assert report.accuracy == pytest.approx(accuracy_score(targets, answers))
        assert report.macro_f1 == pytest.approx(
            f1_score(targets, answers, labels=everyone, average="macro", zero_division=0)
        )
        assert report.negative_log_likelihood == pytest.approx(
            log_loss(targets, probabilities, labels=everyone)
        )
        if classes > 2:  # scikit-learn scales the binary case by a half
            assert report.brier == pytest.approx(
                brier_score_loss(targets, probabilities, labels=everyone, scale_by_half=False)
            )
        expected = precision_recall_fscore_support(
            targets, answers, labels=everyone, zero_division=0
        )
        found = [(c.precision, c.recall, c.f1, c.support) for c in report.classes]
        np.testing.assert_allclose(np.array(found).T, expected)

    @settings(max_examples=40, deadline=None)
    @given(rows=st.integers(1, 80), seed=st.integers(0, 2**32 - 1))
    def test_the_bins_hold_every_row_once(self, rows: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        logits = 5 * generator.normal(size=(rows, 3))
        targets = generator.integers(0, 3, rows).astype(np.intp)
        report = TrainingReport.of_logits(logits, targets, "abc", train_rows=1)
        assert len(report.reliability) == 15
        assert sum(found.rows for found in report.reliability) == rows
        right = sum(found.rows * found.accuracy for found in report.reliability)
        assert right == pytest.approx(rows * report.accuracy)
        for found in report.reliability:
            if found.rows:
                assert found.lower - 1e-12 <= found.confidence <= found.upper + 1e-12

    def test_calibration_error_by_hand(self) -> None:
        # Four answers at 0.8, two of them right; one at 1, right.
        logits = np.log([[0.8, 0.2]] * 4 + [[1.0, 1e-300]])
        targets = np.array([0, 0, 1, 1, 0])
        report = TrainingReport.of_logits(logits, targets, "ab", train_rows=1)
        assert report.calibration_error == pytest.approx(0.8 * 0.3)
        assert report.brier == pytest.approx((2 * 0.08 + 2 * 1.28) / 5)

    def test_it_goes_into_json_and_onto_a_terminal(self) -> None:
        labels = ["short", "a label that is much longer than fits into one line of the table"]
        report = TrainingReport.of_logits(np.eye(2), np.array([0, 1]), labels, train_rows=7)
        document = json.loads(json.dumps(report.to_json()))
        assert document["accuracy"] == 1
        assert document["classes"][1]["label"] == labels[1]
        assert len(document["reliability"]) == 15
        shown = report.render()
        assert "accuracy 1.0000 on 2 held-out rows" in shown
        assert all(len(line) <= 80 for line in shown.splitlines())

    @pytest.mark.parametrize(("rows", "labels"), [(0, "ab"), (2, "abc")])
    def test_shapes_that_do_not_fit_are_refused(self, rows: int, labels: str) -> None:
        with pytest.raises(DatasetError, match="expected"):
            TrainingReport.of_logits(
                np.zeros((rows, 2)), np.zeros(rows, np.intp), labels, train_rows=1
            )


class TestTrainHead:
    @pytest.mark.parametrize("classes", [2, 5])
    def test_probabilities_are_scikit_learns(self, tiny: Backbone, classes: int) -> None:
        dataset = made_up(classes)
        head = train_head(dataset, tiny)
        embeddings = tiny.embed(dataset.test.texts)
        model = LogisticRegression(C=INVERSE_PENALTY, max_iter=2000)
        model.fit(project(tiny.embed(dataset.train.texts), 1.0), dataset.train.targets)
        expected = model.predict_proba(project(embeddings, 1.0))
        assert head.weight.shape == (classes, 16)
        assert head.bias.shape == (classes,)
        logits = project(embeddings, 1.0) @ head.weight.T + head.bias
        np.testing.assert_allclose(softmax(logits), expected, atol=1e-9)
        right = expected.argmax(axis=1) == dataset.test.targets
        assert head.report.accuracy == pytest.approx(right.mean())
        assert head.report.accuracy > 1.5 / classes
        assert (head.report.train_rows, head.report.test_rows) == (300, 80)

    def test_the_same_data_give_the_same_head(self, tiny: Backbone) -> None:
        one, two = (train_head(made_up(3), tiny) for _ in range(2))
        assert (one.weight == two.weight).all()
        assert one.report == two.report

    def test_progress_covers_both_splits(self, tiny: Backbone) -> None:
        seen: list[tuple[int, int]] = []
        train_head(made_up(3), tiny, progress=lambda done, total: seen.append((done, total)))
        assert seen[-1] == (380, 380)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)

    def test_no_weight_is_shown(self, tiny: Backbone) -> None:
        assert repr(train_head(made_up(3), tiny)) == "TrainedHead(classes=3, dimensions=16)"

    def test_a_label_without_rows_is_refused(self, tiny: Backbone) -> None:
        full = made_up(3)
        dataset = Dataset(full.name, full.train, full.test, (*full.labels, "more"), "here", None)
        with pytest.raises(DatasetError, match="1 of 4 labels have no row"):
            train_head(dataset, tiny)

    def test_without_scikit_learn_it_says_what_to_install(
        self, tiny: Backbone, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
        with pytest.raises(ModelError, match=r"veilhead\[train\]"):
            train_head(made_up(3), tiny)


class TestTrainArtifact:
    @pytest.mark.parametrize("normalise", [True, False])
    @pytest.mark.parametrize("classes", [2, 5])
    def test_the_artefact_answers_as_reported(
        self, tiny_directory: Path, tmp_path: Path, normalise: bool, classes: int
    ) -> None:
        dataset = made_up(classes)
        section = describe(tiny_directory, normalise=normalise)
        artifact, report = train_artifact(dataset, tiny_directory, section, device="cpu")
        artifact.save(tmp_path / "m", report=report.to_json())
        loaded = HeadArtifact.load(tmp_path / "m")
        assert loaded.backbone_directory is not None
        backbone = Backbone.load(loaded.backbone_directory, section, device="cpu")
        logits = loaded.logits(backbone.embed(dataset.test.texts))
        again = TrainingReport.of_logits(
            logits, dataset.test.targets, dataset.labels, train_rows=300
        )
        assert again.accuracy == report.accuracy
        assert again.negative_log_likelihood == pytest.approx(report.negative_log_likelihood)
        assert loaded.embedding.scale_origin == ("normalised" if normalise else "given")
        assert (loaded.embedding.scale == 1.0) == normalise
        assert json.loads((tmp_path / "m" / REPORT_FILE).read_text()) == json.loads(
            json.dumps(report.to_json())
        )

    def test_the_backbone_of_an_imported_model(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path / "source", "DistilBert")
        imported, _ = import_hf(tmp_path / "source", tmp_path / "triage", texts=WORDS)
        directory, section = open_backbone(tmp_path / "triage")
        assert section == imported.backbone
        artifact, report = train_artifact(made_up(3), directory, section, device="cpu")
        manifest = artifact.save(tmp_path / "m")
        assert manifest.backbone == imported.backbone
        assert report.test_rows == 80
        (tmp_path / "triage" / "manifest.json").write_text("{}")
        with pytest.raises(BackboneError, match="not the manifest"):
            open_backbone(tmp_path / "triage")

    @pytest.mark.parametrize("terms", ["MIT", None])
    def test_only_published_data_are_told_of(
        self, tiny_directory: Path, tmp_path: Path, terms: str | None
    ) -> None:
        artifact, _ = train_artifact(
            made_up(3, terms=terms), tiny_directory, describe(tiny_directory), device="cpu"
        )
        manifest = artifact.save(tmp_path / "m")
        if terms is None:
            assert manifest.about == {}
            assert b"made-up" not in (tmp_path / "m" / MANIFEST_FILE).read_bytes()
        else:
            assert manifest.about["dataset"] == {
                "name": "made-up",
                "source": "here",
                "license": "MIT",
                "train_rows": 300,
                "test_rows": 80,
            }

    def test_wrong_labels_are_found_before_the_long_work(self, tmp_path: Path) -> None:
        full = made_up(2)
        dataset = Dataset("x", full.train, full.test, ("bell\a", "b"), "here", None)
        nowhere, section = tmp_path / "nowhere", minilm()[1]
        with pytest.raises(ManifestError, match="control characters"):
            train_artifact(dataset, nowhere, section)

    @pytest.mark.slow
    def test_part_of_icd10_chapters_is_enough_for_the_promised_accuracy(self) -> None:
        full = load_dataset("icd10-chapters")  # its rows are in random order
        dataset = Dataset(
            full.name,
            Split(full.train.texts[:3000], full.train.targets[:3000]),
            Split(full.test.texts[:1000], full.test.targets[:1000]),
            full.labels,
            full.source,
            full.license,
        )
        artifact, report = train_artifact(dataset, *minilm())
        assert report.accuracy >= 0.68
        assert artifact.weight.shape == (22, 384)
        assert artifact.scales.error_bound <= 2.0**-10 + 2.0**-13
