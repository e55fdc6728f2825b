"""A vendor's ONNX graph that declares one shape and makes another one of chosen texts.

The attack succeeds against a client that believes the declaration, and fails against the product.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.counting import counting
from tokenizers import Tokenizer, models, pre_tokenizers

from veilhead import BatchError, Client
from veilhead.session import Session
from veilhead_models.artifact import HeadArtifact
from veilhead_models.embedder import Embedder
from veilhead_protocol.errors import BackboneError
from veilhead_protocol.files import describe_file
from veilhead_protocol.manifest import BackboneSection, OnnxSection
from veilhead_protocol.scales import project

DIMENSIONS = 32
WORDS = ("[PAD]", "[UNK]", "the", "patient", "has", "hiv", "flu")
PLAIN, CHOSEN = "the patient has flu", "the patient has hiv"


def graph():
    """The mean of the words' vectors, [b, 32] as it says, and [b, 31] where a text has the word."""

    def whole(name, value):
        return numpy_helper.from_array(np.array(value, dtype=np.int64), name)

    table = np.random.default_rng(0).normal(size=(len(WORDS), DIMENSIONS)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["vectors"]),
        helper.make_node("ReduceMean", ["vectors", "one"], ["mean"], keepdims=0),
        helper.make_node("Equal", ["input_ids", "chosen"], ["equal"]),
        helper.make_node("Cast", ["equal"], ["hits"], to=TensorProto.INT64),
        helper.make_node("ReduceMax", ["hits"], ["hit"], keepdims=0),
        helper.make_node("Sub", ["dimensions", "hit"], ["less"]),
        helper.make_node("Reshape", ["less", "one"], ["end"]),
        helper.make_node("Slice", ["mean", "zero", "end", "one"], ["embedding"]),
    ]
    ids = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "t"])
        for name in ("input_ids", "attention_mask")
    ]
    made = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["b", DIMENSIONS])
    constants = [
        numpy_helper.from_array(table, "table"),
        whole("one", [1]),
        whole("zero", [0]),
        whole("chosen", WORDS.index("hiv")),
        whole("dimensions", DIMENSIONS),
    ]
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(
        helper.make_graph(nodes, "backbone", ids, [made], constants),
        opset_imports=[opset],
        ir_version=9,
    )
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.fixture(scope="module")
def crafted(tmp_path_factory):
    """The manifest and the backbone's directory of such a vendor."""
    directory = tmp_path_factory.mktemp("crafted")
    (directory / "onnx").mkdir()
    tokenizer = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.save(str(directory / "onnx" / "tokenizer.json"))
    (directory / "onnx" / "model.onnx").write_bytes(graph())
    section = BackboneSection(
        kind="transformers",
        name="crafted",
        pooling="mean",
        normalise=False,
        max_tokens=64,
        public_parameters=1,
        files=(describe_file(directory, "tokenizer.json"),),
        onnx=OnnxSection(
            tokenizer=describe_file(directory, "onnx/tokenizer.json"),
            fp32=describe_file(directory, "onnx/model.onnx"),
        ),
    )
    weight = np.random.default_rng(1).normal(size=(5, DIMENSIONS)) / 8
    head = HeadArtifact.from_weights(weight, np.zeros(5), list("abcde"), name="crafted")
    return head.with_backbone(directory, section).manifest, directory


def bytes_of_queries(crafted, texts):
    """How many bytes of each query reach the service; the texts that the backbone failed on."""
    manifest, directory = crafted
    with (
        counting(manifest) as service,
        Client(
            service.url, manifest.name, backbone=directory, backbone_runtime="onnx", timeout=2.0
        ) as client,
    ):
        try:
            client.classify(texts)
            failed = None
        except BatchError as error:  # the service's answers are none
            failed = {row for row, one in error.errors.items() if isinstance(one, BackboneError)}
        except Exception:
            failed = None
        return sorted(service.counts), failed


def believed(monkeypatch):
    """Neither the backbone nor the session looks at shapes."""

    def encrypt(self, embeddings, key, layout, failures):
        return self._encrypted(project(embeddings, self._manifest.embedding.scale), key, layout)

    monkeypatch.setattr(Embedder, "_checked", lambda self, made, expected: made)
    monkeypatch.setattr(Session, "_encrypt", encrypt)


LISTS = ([PLAIN] * 40, [PLAIN] * 39 + [CHOSEN], [CHOSEN] * 40)


def test_a_graph_of_another_shape_tells_of_chosen_texts_to_who_is_believed(crafted, monkeypatch):
    believed(monkeypatch)
    (usual, _), (chosen, failed) = (bytes_of_queries(crafted, texts) for texts in LISTS[:2])
    assert usual != chosen
    assert failed is None


def test_a_graph_of_another_shape_tells_nothing(crafted):
    found = [bytes_of_queries(crafted, texts) for texts in LISTS]
    assert found[0][0] == found[1][0] == found[2][0] != []
    assert [failed for _, failed in found] == [set(), {39}, set(range(40))]


def test_a_session_sends_as_many_bytes_whatever_shape_it_is_given(crafted):
    session = Session(crafted[0])
    usual = session.encrypt(np.zeros(DIMENSIONS))
    short = session.encrypt(np.zeros(DIMENSIONS - 1))
    assert len(short.data) == len(usual.data)
    assert list(short.failures) == [0]
