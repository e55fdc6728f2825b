"""Entities out of encrypted answers, against the transformers pipeline on the same checkpoint."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import transformers
from support.checkpoints import TEXTS, save_checkpoint

from veilhead import Client
from veilhead.engine import Engine
from veilhead.tokens import TokenShape
from veilhead_models.backbone import Backbone
from veilhead_models.hf_import import import_hf
from veilhead_protocol.errors import BackboneError, BatchError, InputError

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
STRATEGIES = ("none", "simple", "first", "average", "max")

#: A logit is off by the manifest's bound at most, a probability by no more than half of twice that.
TOLERANCE = 1.5e-3

LONG = "Anna severely mild arms in Oslo, broken fevers. acute pains Anna Oslo " * 3


class Pair:
    """The encrypted model and transformers' own pipeline."""

    def __init__(self, directory, architecture, words, seed):
        source = directory / "source"
        save_checkpoint(
            source, architecture, task="TokenClassification", labels=LABELS, words=words, seed=seed
        )
        self.manifest, self.report = import_hf(source, directory / "tagger", texts=TEXTS)
        self.client = Client.local(directory / "tagger", device="cpu")
        self.pipeline = transformers.pipeline("token-classification", str(source), device=-1)

    def expected(self, texts, strategy, **options):
        with warnings.catch_warnings():
            # Tokenizers whose pieces do not tell words apart: it warns of its own heuristic.
            warnings.simplefilter("ignore", UserWarning)
            return self.pipeline(texts, aggregation_strategy=strategy, **options)


#: With these seeds no label of the texts hangs on less than an answer's error: at a near tie both
#: labels are right.
@pytest.fixture(
    scope="module", params=[("Bert", "pieces", 1), ("Roberta", "bytes", 4)], ids=["Bert", "Roberta"]
)
def pair(request, tmp_path_factory):
    made = Pair(tmp_path_factory.mktemp("tagger"), *request.param)
    with made.client:
        yield made


def check(found, expected):
    assert len(found) == len(expected)
    for entity, other in zip(found, expected, strict=True):
        assert list(entity) == list(other)
        for key, value in other.items():
            if key == "score":
                assert entity[key] == pytest.approx(float(value), abs=TOLERANCE)
            else:
                assert entity[key] == value


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_entities_are_those_of_the_pipeline(pair, strategy):
    found = pair.client.classify_tokens(TEXTS, aggregation_strategy=strategy)
    expected = pair.expected(list(TEXTS), strategy)
    assert sum(map(len, expected)) > 5, "a model that finds nothing would show nothing"
    for ours, theirs in zip(found, expected, strict=True):
        check(ours, theirs)
    check(pair.client.classify_tokens(TEXTS[2], aggregation_strategy=strategy), expected[2])


def test_labels_that_are_ignored(pair):
    ignored = ["B-PER", "I-LOC"]
    found = pair.client.classify_tokens(TEXTS[2], ignore_labels=ignored)
    check(found, pair.expected(TEXTS[2], "none", ignore_labels=ignored))
    everything = pair.client.classify_tokens(TEXTS[2], ignore_labels=[])
    assert len(everything) > len(found)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_long_text_is_cut_as_the_pipeline_cuts_it(pair, strategy):
    found = pair.client.classify_tokens(LONG, aggregation_strategy=strategy)
    check(found, pair.expected(LONG, strategy))


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("stride", [0, 7])
def test_a_long_text_in_windows(pair, strategy, stride):
    found = pair.client.classify_tokens(LONG, aggregation_strategy=strategy, stride=stride)
    check(found, pair.expected(LONG, strategy, stride=stride))
    assert found[-1]["end"] > len(LONG) - 10


def test_a_text_without_tokens_has_no_entities(pair):
    assert pair.client.classify_tokens(["", "fever"])[0] == []


def test_wrong_arguments_are_named(pair):
    with pytest.raises(ValueError, match="aggregation_strategy"):
        pair.client.classify_tokens("fever", aggregation_strategy="best")
    with pytest.raises(ValueError, match="stride"):
        pair.client.classify_tokens("fever", stride=3)
    with pytest.raises(BackboneError, match="expected 0 to 29"):
        pair.client.classify_tokens("fever", aggregation_strategy="max", stride=30)
    with pytest.raises(InputError, match="call `classify_tokens`"):
        pair.client.classify("fever")
    with pytest.raises(InputError, match="call `classify_tokens`"):
        next(pair.client.classify_many(["fever"]))


def test_a_bad_text_fails_alone(pair):
    with pytest.raises(BatchError) as raised:
        pair.client.classify_tokens(["fever", 3, "Anna in Oslo"])
    assert list(raised.value.errors) == [1]
    check(raised.value.results[2], pair.expected("Anna in Oslo", "none"))


def test_a_text_that_the_backbone_fails_on_sends_as_many_rows_and_fails_alone(pair, monkeypatch):
    client, shapes = pair.client, []
    infer, embed = Engine.infer, Backbone.embed_tokens

    async def watched(self, embeddings, call):
        shapes.append((embeddings.shape, bool(np.isnan(embeddings).all())))
        return await infer(self, embeddings, call)

    def fails(self, texts, *, stride=None):
        if "broken" in texts[0]:
            raise IndexError("index 4711 is out of range")
        return embed(self, texts, stride=stride)

    monkeypatch.setattr(Engine, "infer", watched)
    texts = ["fever", "broken arm of Anna", "Anna in Oslo"]
    client.classify_tokens(texts)
    expected = sorted(shape for shape, _ in shapes)
    shapes.clear()
    monkeypatch.setattr(Backbone, "embed_tokens", fails)
    with pytest.raises(BatchError) as raised:
        client.classify_tokens(texts)
    assert list(raised.value.errors) == [1]
    assert "4711" not in str(raised.value.errors[1])
    assert sorted(shape for shape, _ in shapes) == expected
    assert sum(decoys for _, decoys in shapes) == 1


def test_entities_are_made_once_all_is_sent(pair, monkeypatch):
    asked, seen = [], []
    infer, entities = Engine.infer, TokenShape.entities

    async def watched(self, embeddings, call):
        asked.append(len(embeddings))
        return await infer(self, embeddings, call)

    def noted(self, windows, join):
        seen.append(len(asked))
        return entities(self, windows, join)

    monkeypatch.setattr(Engine, "infer", watched)
    monkeypatch.setattr(TokenShape, "entities", noted)
    pair.client.classify_tokens(list(TEXTS) * 3)
    assert seen == [3 * len(TEXTS)] * (3 * len(TEXTS))


def test_embed_first_embeds_every_text_before_any_token_is_sent(pair, monkeypatch):
    embedded, before = [], []
    infer, embed = Engine.infer, Backbone.embed_tokens

    async def watched(self, embeddings, call):
        before.append(len(embedded))
        return await infer(self, embeddings, call)

    def noted(self, texts, *, stride=None):
        embedded.append(texts)
        return embed(self, texts, stride=stride)

    monkeypatch.setattr(Engine, "infer", watched)
    monkeypatch.setattr(Backbone, "embed_tokens", noted)
    expected = pair.client.classify_tokens(list(TEXTS))
    assert min(before) < len(TEXTS)
    embedded.clear()
    before.clear()
    monkeypatch.setattr(pair.client._client, "_embed_first", True)
    found = pair.client.classify_tokens(list(TEXTS))
    assert before == [len(TEXTS)] * len(TEXTS)
    assert [len(row) for row in found] == [len(row) for row in expected]


def test_the_report_counts_tokens(pair):
    assert pair.manifest.task == "token-classification"
    assert pair.report.parity.rows == pair.report.calibration_rows > len(TEXTS)
    assert pair.report.parity.labels_equal == pair.report.parity.decided > 0
