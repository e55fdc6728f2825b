"""Token heads: the backbone of tokens, training, and what the artefact says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support.backbones import WORDS
from support.checkpoints import save_checkpoint
from typer.testing import CliRunner

from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import Backbone, describe, token_backbone
from veilhead_models.hf_import import import_hf
from veilhead_models.privacy import PrivacyBudget
from veilhead_models.records import Entity, Record, RecordDataset, write_records
from veilhead_models.tagging import calibrated_scale, train_tagger_artifact
from veilhead_protocol.errors import BackboneError, DatasetError, ManifestError, PrivacyError
from veilhead_protocol.policy import preset_policy
from veilhead_service.cli import app


def generated(count: int, seed: int = 0) -> list[Record]:
    """Records in which two words are of a kind, wherever they stand; `broken arm` is one entity."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        words = generator.choice(WORDS, generator.integers(3, 9)).tolist()
        if "broken" not in words:
            words += ["broken"]
        words = " ".join(words).replace("broken", "broken arm").split()
        text, entities = "", []
        for place, word in enumerate(words):
            start = len(text) + bool(text)
            text = f"{text} {word}".strip()
            if word == "fever":
                entities.append(Entity(start, len(text), "SIGN"))
            elif word == "arm" and place and words[place - 1] == "broken":
                entities.append(Entity(start - len("broken "), len(text), "INJURY"))
        found.append(Record(text, tuple(entities)))
    return found


def dataset(train: int = 250, test: int = 60) -> RecordDataset:
    return RecordDataset.of(generated(train), generated(test, seed=1))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path / "cache"))


def save_encoder(directory: Path, architecture: str) -> Path:
    """An encoder of four layers with random weights."""
    # DistilBERT has another word for it.
    save_checkpoint(directory / "classifier", architecture, num_hidden_layers=4, n_layers=4)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory / "classifier"
    )
    classifier.base_model.save_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "classifier")
    tokenizer.save_pretrained(directory)
    return directory


class TestBackbone:
    def test_its_embeddings_are_the_states_after_half_of_the_layers(self, tmp_path: Path) -> None:
        source = save_encoder(tmp_path / "encoder", "Bert")
        encoder = transformers.AutoModel.from_pretrained(source).eval()
        whole = describe(source)
        directory, section = token_backbone(source, whole)
        assert (section.pooling, section.split, section.normalise) == (
            "tokens",
            "classifier",
            False,
        )
        assert section.max_tokens == whole.max_tokens
        assert section.public_parameters < 0.7 * whole.public_parameters
        backbone = Backbone.load(directory, section, device="cpu")
        [[window]] = backbone.embed_tokens(["Anna in Oslo, mildly"])
        inputs = backbone.tokenizer("Anna in Oslo, mildly", return_tensors="pt")
        with torch.inference_mode():
            states = encoder(**inputs, output_hidden_states=True).hidden_states
        assert len(states) == 5
        np.testing.assert_allclose(window.embeddings, states[2][0, 1:-1].numpy(), atol=1e-5)

    @pytest.mark.parametrize("architecture", ["DistilBert", "Roberta", "MPNet", "Llama"])
    def test_encoders_of_many_architectures_can_be_halved(
        self, architecture: str, tmp_path: Path
    ) -> None:
        source = save_encoder(tmp_path / "encoder", architecture)
        directory, section = token_backbone(source, describe(source))
        backbone = Backbone.load(directory, section, device="cpu")
        [[window]] = backbone.embed_tokens(["Anna in Oslo"])
        assert window.embeddings.shape == (3, 16)
        assert section.public_parameters < describe(source).public_parameters

    def test_a_classifier_with_layers_of_its_own_is_refused(self, tmp_path: Path) -> None:
        source = save_encoder(tmp_path / "encoder", "ModernBert")
        directory, section = token_backbone(source, describe(source))
        with pytest.raises(BackboneError, match="lack 2 of the tensors"):
            Backbone.load(directory, section, device="cpu")

    def test_the_same_encoder_gives_the_same_files(self, tiny_directory: Path) -> None:
        first, one = token_backbone(tiny_directory, describe(tiny_directory))
        second, other = token_backbone(tiny_directory, describe(tiny_directory))
        assert (first, one) == (second, other)
        assert token_backbone(first, one) == (first, one)
        (first / "config.json").write_text("{}")  # damaged: made again
        third, again = token_backbone(tiny_directory, describe(tiny_directory))
        assert (third, again) == (first, one)
        assert Backbone.load(third, again, device="cpu").dimensions == 16

    def test_what_has_no_token_classifier_is_refused(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path / "texts", "Bert")
        manifest, _ = import_hf(tmp_path / "texts", tmp_path / "made")
        with pytest.raises(BackboneError, match="is a classifier of texts"):
            token_backbone(tmp_path / "made" / "backbone", manifest.backbone)

    def test_the_scale_follows_from_the_backbone_alone(self, tiny_directory: Path) -> None:
        directory, section = token_backbone(tiny_directory, describe(tiny_directory))
        one, other = (
            calibrated_scale(Backbone.load(directory, section, device="cpu")) for _ in range(2)
        )
        assert one == other
        assert one.scale_origin == "calibrated"
        assert one.scale == pytest.approx(4.0, rel=0.05)  # of 16 values after a layer norm


class TestArtifact:
    def test_a_private_one_says_what_is_guaranteed_and_nothing_of_the_records(
        self, tiny_directory: Path, tmp_path: Path
    ) -> None:
        seen: list[tuple[int, int]] = []
        artifact, report = train_tagger_artifact(
            dataset(),
            tiny_directory,
            describe(tiny_directory),
            device="cpu",
            privacy=PrivacyBudget(4.0, 1e-6),
            progress=lambda done, total: seen.append((done, total)),
        )
        manifest = artifact.save(tmp_path / "private", report=report.to_json())
        assert manifest.task == "token-classification"
        assert manifest.head.labels == ("O", "I-INJURY", "I-SIGN")
        privacy = manifest.about["privacy"]
        assert (privacy["epsilon"], privacy["delta"]) == (4.0, 1e-6)
        assert privacy["unit"] == "one record (all of its tokens) of the training split"
        assert len(privacy["accountants"]) == 2
        assert set(manifest.about) == {"privacy"}
        total = report.train_records + report.test_records
        assert seen == [(done, total) for done in range(1, total + 1)]
        assert HeadArtifact.load(tmp_path / "private").manifest == manifest

    def test_without_a_budget_the_same_records_give_the_same_head(
        self, tiny_directory: Path
    ) -> None:
        one, other = (
            train_tagger_artifact(
                dataset(), tiny_directory, describe(tiny_directory), name="a", device="cpu"
            )
            for _ in range(2)
        )
        assert one[1] == other[1]
        np.testing.assert_array_equal(one[0].weight, other[0].weight)
        assert one[1].micro_relaxed.f1 > 0.15  # random weights: they mix up what stands where
        assert "privacy" not in one[0].about

    def test_refusals_come_before_anything_is_embedded(self, tiny_directory: Path) -> None:
        def train(data: RecordDataset, **options: object) -> None:
            def progress(done: int, total: int) -> None:
                raise AssertionError(f"{done} of {total} were embedded")

            train_tagger_artifact(
                data,
                tiny_directory,
                describe(tiny_directory),
                device="cpu",
                progress=progress,
                **options,
            )

        with pytest.raises(PrivacyError, match="mostly noise"):
            train(dataset(30), privacy=PrivacyBudget(1.0))
        with pytest.raises(PrivacyError, match="above 1/250"):
            train(dataset(250), privacy=PrivacyBudget(4.0, 0.01))
        data = dataset(30)
        rare = Record("mild arm", (Entity(0, 4, "MANNER"),))
        with pytest.raises(DatasetError, match="1 of 3 kinds of entities have none"):
            train(RecordDataset.of(data.train, [*data.test, rare]))
        with pytest.raises(ManifestError, match="policy"):
            train(data, policy=preset_policy("medical"), parameters="compact")


class TestCommand:
    def test_a_file_of_records_becomes_an_artefact_with_a_report_and_a_card(
        self, tiny_directory: Path, tmp_path: Path
    ) -> None:
        write_records(tmp_path / "a.jsonl", generated(300))
        common = ["train", str(tmp_path / "a.jsonl"), "--task", "token-classification"]
        common += ["--backbone", str(tiny_directory), "--device", "cpu"]
        for name, options in (("plain", []), ("private", ["--dp-epsilon", "4"])):
            out = str(tmp_path / name)
            done = CliRunner().invoke(app, [*common, "--out", out, *options])
            assert done.exit_code == 0, done.output
            assert "entity-level scores" in done.output
            assert "INJURY" in done.output
        assert "one record (all of its tokens) of the training split more or less" in done.output
        card = ["card", out, "--rows", "0", "--without-dp", str(tmp_path / "plain")]
        shown = CliRunner().invoke(app, card).output
        for said in (
            "A private linear head for token classification",
            "held-out records, as clients would get them",
            "| INJURY |",
            "those that pay most for the noise first",
            "one record (all of its tokens)",
            "| precision, recall, F1 | this head | without differential privacy |",
        ):
            assert said in shown, said
        alone = CliRunner().invoke(app, ["card", str(tmp_path / "plain"), "--rows", "0"]).output
        assert "the last score is by overlapping places" in alone

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--text", "note"], "records have no columns"),
            (["--dp-epsilon", "25"], "expected at most 20"),
            ([], "cannot be read"),
        ],
    )
    def test_nonsense_is_refused_at_once(
        self, tmp_path: Path, options: list[str], message: str
    ) -> None:
        arguments = ["train", str(tmp_path / "absent.jsonl"), "--task", "token-classification"]
        done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "x"), *options])
        assert done.exit_code == 1
        assert message in done.output
