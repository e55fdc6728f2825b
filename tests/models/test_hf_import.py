"""Imported classifiers: encrypted answers against the checkpoint's own, by transformers itself."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.checkpoints import ARCHITECTURES, TEXTS, save_checkpoint, split_of
from support.services import running

from veilhead import Client
from veilhead_models import norm_bound as norm_bound_module
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import Backbone, minilm
from veilhead_models.checkpoint import GENERATED_TEXTS
from veilhead_models.embedding_module import EmbeddingModule
from veilhead_models.hf_import import import_hf
from veilhead_protocol.errors import ArtifactError, CheckpointError, ScaleError
from veilhead_service.model_store import publish

#: Of a logit of these models, from sums in another order.
FLOAT = 2e-4

TANH = ("Bert", "Roberta", "Albert", "MPNet", "XLMRoberta", "Camembert", "Funnel", "XLNet")


def own_logits(directory, texts=TEXTS):
    """What transformers itself computes of each text, [texts, C]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    rows = []
    with torch.inference_mode():
        for text in texts:
            encoded = tokenizer(text, truncation=True, return_tensors="pt")
            rows.append(model(**encoded).logits[0].double().numpy())
    return np.array(rows)


class Imported:
    """A checkpoint, and its artefact."""

    def __init__(self, directory, make):
        self.source, self.artifact = directory / "source", directory / "artifact"
        self.source.mkdir()
        make(self.source)
        self.manifest, self.report = import_hf(
            self.source, self.artifact, name=directory.name, texts=TEXTS
        )
        self.expected = own_logits(self.source)

    def tolerance(self):
        return self.manifest.head.error_bound + FLOAT * np.abs(self.expected).max()

    def agrees(self, logits):
        """Whether logits [texts, C] are the checkpoint's own."""
        return np.abs(logits - self.expected).max() <= self.tolerance()


def save_minilm_classifier(directory):
    """MiniLM with a random head on its pooler."""
    source, _ = minilm()
    torch.manual_seed(3)
    model = transformers.BertForSequenceClassification.from_pretrained(source, num_labels=4)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.randn(4, 384))
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(directory)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Every architecture of the tests, and MiniLM, by name."""
    root = tmp_path_factory.mktemp("imported")
    found = {}
    for name in ARCHITECTURES:
        (root / name).mkdir()
        found[name] = Imported(root / name, lambda path, name=name: save_checkpoint(path, name))
    (root / "MiniLM").mkdir()
    found["MiniLM"] = Imported(root / "MiniLM", save_minilm_classifier)
    return found


@pytest.fixture(scope="module")
def service(imported, tmp_path_factory):
    """The real service of them all."""
    store = tmp_path_factory.mktemp("store")
    for model in imported.values():
        publish(model.artifact, store)
    with running(store, "--workers", "1") as url:
        yield url


@pytest.mark.parametrize("name", [*ARCHITECTURES, "MiniLM"])
class TestEveryArchitecture:
    def test_encrypted_logits_are_the_checkpoints_own(self, imported, service, name):
        model = imported[name]
        spread = np.ptp(model.expected, axis=0).max()
        assert spread > 1, "texts whose logits are alike would show nothing"
        with Client(service, name, backbone=model.artifact / "backbone", device="cpu") as client:
            logits = client.logits(client.embed(TEXTS))
            labels = [row[0].label for row in client.classify(TEXTS)]
        assert model.agrees(logits)
        best = np.sort(model.expected, axis=1)
        for row, label in enumerate(labels):
            if best[row, -1] - best[row, -2] > 2 * model.tolerance():
                assert label == model.manifest.head.labels[model.expected[row].argmax()]

    def test_what_is_public_and_what_is_private(self, imported, name):
        model = imported[name]
        manifest, head = model.manifest, HeadArtifact.load(model.artifact)
        tensors = load_file(model.source / "model.safetensors")
        split = "classifier" if name == "MiniLM" else split_of(name)
        total = sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
        own = [
            tensors[f"{split}.{part}"]
            for part in ("weight", "bias")
            if f"{split}.{part}" in tensors
        ]
        assert manifest.backbone.public_parameters == total - sum(part.numel() for part in own)
        assert manifest.head.private_parameters == head.weight.size + head.bias.size
        assert (manifest.backbone.split, manifest.task) == (split, "text-classification")
        published = load_file(model.artifact / "backbone" / "model.safetensors")
        assert not {key for key in published if key.startswith(f"{split}.")}
        scaled = own[0].double().numpy() * manifest.embedding.scale
        np.testing.assert_allclose(head.weight, scaled)
        config = (model.artifact / "backbone" / "config.json").read_text()
        assert not {"id2label", "label2id", "problem_type"} & set(json.loads(config))
        assert str(model.source.parent) not in config

    def test_the_scale_holds_and_says_where_it_is_from(self, imported, name):
        model = imported[name]
        section = model.manifest.embedding
        backbone = Backbone.load(model.artifact / "backbone", model.manifest.backbone, device="cpu")
        norms = np.linalg.norm(backbone.embed(TEXTS), axis=1)
        assert norms.max() <= section.scale * (1 + 1e-6)
        assert model.report.shortened_rows == 0
        if name in TANH:
            assert section.scale_origin == "derived"
            assert section.scale == backbone.dimensions**0.5
        elif name in ("GPT2", "ModernBert"):  # a layer normalisation
            assert section.scale_origin == "derived"
        elif name != "MiniLM":
            assert section.scale_origin == "calibrated"
            assert (section.calibration.rows, section.calibration.margin) == (len(TEXTS), 1.25)


#: What may go wrong with a backbone: a part of it that is left out.
MUTATIONS = {
    "DistilBert without the layer before the classifier": ("DistilBert", "pre_classifier"),
    "DistilBert without the activation": ("DistilBert", "relu"),
    "Bert without the pooler": ("Bert", "bert.pooler.dense"),
    "Bert without the pooler's activation": ("Bert", "bert.pooler.activation"),
    "Roberta without the dense layer": ("Roberta", "classifier.dense"),
    "Roberta without the activation": ("Roberta", "tanh"),
    "Electra without the dense layer": ("Electra", "classifier.dense"),
    "Electra without the activation": ("Electra", "classifier.activation"),
    "DebertaV2 without the pooler": ("DebertaV2", "pooler.dense"),
    "Albert without the pooler": ("Albert", "albert.pooler"),
    "Albert without the pooler's activation": ("Albert", "albert.pooler_activation"),
    "MPNet without the dense layer": ("MPNet", "classifier.dense"),
}


class TestMutations:
    """A part that is missing must show, or the tests above would prove nothing."""

    @pytest.mark.parametrize("mutation", MUTATIONS)
    def test_a_missing_part_shows(self, imported, service, monkeypatch, mutation):
        name, part = MUTATIONS[mutation]
        model = imported[name]
        backbone = Backbone.load(model.artifact / "backbone", model.manifest.backbone, device="cpu")
        if part == "relu":
            monkeypatch.setattr(torch.nn.functional, "relu", lambda values, inplace=False: values)
        elif part == "tanh":
            monkeypatch.setattr(torch, "tanh", lambda values: values)
        else:
            backbone.module.transformer.set_submodule(part, torch.nn.Identity())
        with Client(service, name, backbone=model.artifact / "backbone", device="cpu") as client:
            assert not model.agrees(client.logits(backbone.embed(TEXTS)))

    @pytest.mark.parametrize("name", ["DistilBert", "Bert", "Roberta"])
    def test_a_missing_bias_shows(self, imported, name):
        model = imported[name]
        head = HeadArtifact.load(model.artifact)
        backbone = Backbone.load(model.artifact / "backbone", model.manifest.backbone, device="cpu")
        logits = head.logits(backbone.embed(TEXTS))
        assert model.agrees(logits)
        assert not model.agrees(logits - head.bias)

    def test_the_import_itself_notices(self, tmp_path, monkeypatch):
        save_checkpoint(tmp_path / "source", "Roberta")
        forward = EmbeddingModule.forward
        monkeypatch.setattr(
            EmbeddingModule, "forward", lambda *arguments: 0.5 * forward(*arguments)
        )
        with pytest.raises(CheckpointError, match=r"RobertaFor.* differ by up to"):
            import_hf(tmp_path / "source", tmp_path / "out", texts=TEXTS)
        assert not (tmp_path / "out").exists()


@pytest.fixture
def source(tmp_path):
    """A checkpoint that can be imported, for tests to spoil."""
    save_checkpoint(tmp_path / "source", "Bert")
    return tmp_path / "source"


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class TestProblems:
    @pytest.mark.parametrize(
        ("problem", "expected"),
        [
            ("single_label_classification", "single_label"),
            ("multi_label_classification", "multi_label"),
            ("regression", "regression"),
        ],
    )
    def test_predictions_are_those_of_the_pipeline(self, tmp_path, problem, expected):
        save_checkpoint(tmp_path / "source", "DistilBert", problem_type=problem)
        manifest, report = import_hf(tmp_path / "source", tmp_path / "out", texts=TEXTS)
        assert manifest.head.problem_type == report.problem_type == expected
        pipeline = transformers.pipeline("text-classification", str(tmp_path / "source"), device=-1)
        with Client.local(tmp_path / "out", device="cpu") as client:
            found = client.classify(TEXTS, top_k=None)
        for ours, theirs in zip(found, pipeline(list(TEXTS), top_k=None), strict=True):
            assert [answer.label for answer in ours] == [answer["label"] for answer in theirs]
            for answer, other in zip(ours, theirs, strict=True):
                assert answer.score == pytest.approx(other["score"], abs=2e-3)

    def test_one_label_without_a_problem_type(self, tmp_path):
        save_checkpoint(tmp_path / "source", "Bert", labels=["risk"])
        manifest, _ = import_hf(tmp_path / "source", tmp_path / "out", texts=TEXTS)
        pipeline = transformers.pipeline("text-classification", str(tmp_path / "source"), device=-1)
        with Client.local(tmp_path / "out", device="cpu") as client:
            found = client.classify("fever")[0]
        assert found.label == "risk"
        assert found.score == pytest.approx(pipeline("fever")[0]["score"], abs=2e-3)
        assert manifest.head.problem_type == "single_label"


class TestLabels:
    def test_a_missing_one_is_numbered(self, source, tmp_path):
        edit(source / "config.json", id2label={"0": "a", "2": "c"}, num_labels=3)
        manifest, _ = import_hf(source, tmp_path / "out", texts=TEXTS)
        assert manifest.head.labels == ("a", "LABEL_1", "c")

    def test_too_few_for_the_head_are_refused(self, source, tmp_path):
        edit(source / "config.json", id2label={"0": "a", "1": "b"})
        with pytest.raises(CheckpointError, match="cannot be loaded as BertFor"):
            import_hf(source, tmp_path / "out", texts=TEXTS)

    def test_what_is_no_table_is_refused(self, source, tmp_path):
        edit(source / "config.json", id2label={"first": "a"}, num_labels=3)
        with pytest.raises(CheckpointError, match=r"cannot be loaded|id2label"):
            import_hf(source, tmp_path / "out", texts=TEXTS)

    def test_two_that_are_equal_are_refused(self, source, tmp_path):
        edit(source / "config.json", id2label={"0": "a", "1": "b", "2": "a"})
        with pytest.raises(ArtifactError, match=r"'a' stand for several rows.*id2label"):
            import_hf(source, tmp_path / "out", texts=TEXTS)


class TestScale:
    def test_given(self, source, tmp_path):
        manifest, report = import_hf(source, tmp_path / "out", texts=TEXTS, embedding_scale=1.5)
        assert (manifest.embedding.scale, manifest.embedding.scale_origin) == (1.5, "given")
        # A tanh of 16 values is longer: these rows are shortened, and the comparison leaves them.
        assert report.shortened_rows == report.parity.shortened == len(TEXTS)
        assert "6 of 6 texts are longer than it" in report.render()
        with pytest.raises(ArtifactError, match="1e-9 to 1e9"):
            import_hf(source, tmp_path / "out", texts=TEXTS, embedding_scale=0)

    def test_generated_texts_have_the_wider_margin(self, tmp_path):
        save_checkpoint(tmp_path / "source", "DistilBert")
        manifest, report = import_hf(tmp_path / "source", tmp_path / "out")
        calibration = manifest.embedding.calibration
        assert (calibration.rows, calibration.margin) == (GENERATED_TEXTS, 2.0)
        assert report.texts_generated

    def test_a_scale_that_the_set_cannot_carry_is_refused(self, source, tmp_path):
        with pytest.raises(ScaleError, match="smaller embedding_scale"):
            import_hf(source, tmp_path / "out", texts=TEXTS, embedding_scale=1e9)

    def test_a_bound_that_the_set_cannot_carry_gives_way_to_a_measurement(
        self, source, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(norm_bound_module, "norm_bound", lambda *_: (1e6, "far too wide"))
        manifest, _ = import_hf(source, tmp_path / "out", texts=TEXTS)
        assert manifest.embedding.scale_origin == "calibrated"
        assert manifest.embedding.scale < 10


class TestReport:
    def test_it_says_what_becomes_public(self, source, tmp_path):
        manifest, report = import_hf(source, tmp_path / "out", texts=TEXTS)
        text = report.render()
        assert f"public   {manifest.backbone.public_parameters:>13,} parameters" in text
        assert f"private  {manifest.head.private_parameters:>13,} parameters" in text
        assert "WARNING" in text
        assert "discloses" in text
        saved = json.loads((tmp_path / "out" / "report.json").read_text())
        assert saved == json.loads(json.dumps(report.to_json()))

    def test_a_public_backbone_is_known_bit_by_bit(self, imported):
        text = imported["MiniLM"].report.render()
        assert "the backbone is all-MiniLM-L6-v2, bit by bit" in text
        assert "WARNING" not in text

    def test_one_bit_makes_it_another_backbone(self, imported, tmp_path):
        shutil.copytree(imported["MiniLM"].source, tmp_path / "source")
        file = tmp_path / "source" / "model.safetensors"
        weights = load_file(file)
        bias = weights["bert.pooler.dense.bias"]
        bias[0] = torch.nextafter(bias[0], torch.tensor(torch.inf))
        save_file(weights, file, metadata={"format": "pt"})
        _, report = import_hf(tmp_path / "source", tmp_path / "out", texts=TEXTS)
        assert "WARNING" in report.render()


class TestRefusals:
    def refused(self, source, match):
        with pytest.raises(CheckpointError, match=match):
            import_hf(source, source.parent / "out", texts=TEXTS)
        assert not (source.parent / "out").exists()

    @pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
    def test_code_that_comes_with_it(self, source, file):
        edit(source / file, auto_map={"AutoModelForSequenceClassification": "code.Model"})
        (source / "code.py").write_text("raise SystemExit('ran')")
        self.refused(source, r"auto_map.*never done")

    def test_pickle(self, source):
        (source / "model.safetensors").rename(source / "pytorch_model.bin")
        self.refused(source, r"pytorch_model\.bin.*never read.*save_pretrained")

    def test_an_adapter(self, source):
        (source / "adapter_config.json").write_text("{}")
        self.refused(source, "merge")

    def test_no_checkpoint(self, tmp_path):
        (tmp_path / "source").mkdir()
        self.refused(tmp_path / "source", r"no config\.json")

    def test_a_head_that_was_never_trained(self, source):
        weights = load_file(source / "model.safetensors")
        del weights["classifier.weight"]
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
        self.refused(source, r"lacks 1 tensors of BertFor.*classifier\.weight")

    @pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertModel"])
    def test_what_is_no_classifier(self, source, architecture):
        edit(source / "config.json", architectures=[architecture])
        self.refused(source, rf"holds {architecture}, expected.*veilhead-server train")

    def test_a_class_that_transformers_does_not_have(self, source):
        edit(source / "config.json", architectures=["OursForSequenceClassification"])
        self.refused(source, "loads it as BertForSequenceClassification")

    def test_an_architecture_that_does_not_end_in_a_linear_layer(self, source, monkeypatch):
        forward = transformers.BertForSequenceClassification.forward

        def doubled(self, *arguments, **options):
            output = forward(self, *arguments, **options)
            output.logits = output.logits**2
            return output

        monkeypatch.setattr(transformers.BertForSequenceClassification, "forward", doubled)
        self.refused(source, r"cannot be split; its last modules are .*classifier \(Linear\)")

    def test_a_head_that_is_published_under_another_name(self, tmp_path, monkeypatch):
        save_checkpoint(tmp_path / "source", "Bert")
        build = transformers.BertForSequenceClassification.__init__

        def with_copy(self, *arguments, **options):
            build(self, *arguments, **options)
            self.copied = torch.nn.Linear(16, 3)

        monkeypatch.setattr(transformers.BertForSequenceClassification, "__init__", with_copy)
        file = tmp_path / "source" / "model.safetensors"
        weights = load_file(file)
        for part in ("weight", "bias"):
            weights[f"copied.{part}"] = weights[f"classifier.{part}"].clone()
        save_file(weights, file, metadata={"format": "pt"})
        self.refused(tmp_path / "source", r"copied\.weight, which would be published")

    def test_texts_that_are_padded_on_the_wrong_side(self, tmp_path):
        save_checkpoint(tmp_path / "source", "XLNet")
        edit(tmp_path / "source" / "tokenizer_config.json", padding_side="right")
        self.refused(tmp_path / "source", "differ by up to")
