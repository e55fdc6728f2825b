"""Imported classifiers: encrypted answers against the checkpoint's own, by transformers itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.checkpoints import ARCHITECTURES, TEXTS, save_checkpoint, split_of
from support.services import running

from veilhead import Client
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import Backbone, minilm
from veilhead_models.hf_import import import_hf
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
        assert np.abs(logits - model.expected).max() <= model.tolerance()
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
        elif name == "GPT2":  # a layer normalisation
            assert section.scale_origin == "derived"
        elif name != "MiniLM":
            assert section.scale_origin == "calibrated"
            assert (section.calibration.rows, section.calibration.margin) == (len(TEXTS), 1.25)
