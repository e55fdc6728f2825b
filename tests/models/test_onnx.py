"""Backbones without torch: the ONNX form says what the original says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support.checkpoints import TEXTS, save_checkpoint

from veilhead_models import onnx_backbone, onnx_export
from veilhead_models.artifact import BACKBONE_DIRECTORY, HeadArtifact
from veilhead_models.backbone import Backbone, minilm
from veilhead_models.hf_import import import_hf
from veilhead_models.onnx_backbone import OnnxBackbone, onnx_files
from veilhead_models.onnx_export import GRAPH_FILES, PROBES, TOKENIZER_FILE, export_onnx
from veilhead_models.plain_tokenizer import PlainTokenizer
from veilhead_protocol.errors import ArtifactError, BackboneError
from veilhead_protocol.files import describe_file

#: Long, short, empty, strange: in one call, so that they are padded.
MIXED = (*TEXTS, *PROBES[:-1], "acute pain " * 20, "\ud800 half a pair")


@dataclass(frozen=True)
class Exported:
    """An artefact with both precisions, and what was said of them."""

    directory: Path
    artifact: HeadArtifact
    parities: list[onnx_export.OnnxParity]

    @property
    def backbone(self):
        return self.directory / BACKBONE_DIRECTORY

    def torch(self):
        return Backbone.load(self.backbone, self.artifact.backbone, device="cpu")

    def onnx(self, precision="fp32"):
        return OnnxBackbone.load(
            self.backbone, self.artifact.backbone, precision=precision, device="cpu"
        )


def exported_from(directory):
    _, parities = export_onnx(directory, precisions=("fp32", "fp16"))
    return Exported(directory, HeadArtifact.load(directory), parities)


@pytest.fixture(scope="module")
def of_texts(tmp_path_factory):
    """A RoBERTa classifier: its positions depend on what is padding, and a layer follows."""
    root = tmp_path_factory.mktemp("texts")
    save_checkpoint(root / "checkpoint", "Roberta")
    import_hf(root / "checkpoint", root / "triage")
    (root / "triage" / "report.json").write_text('{"how": "it was made"}')
    return exported_from(root / "triage")


@pytest.fixture(scope="module")
def of_tokens(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokens")
    save_checkpoint(root / "checkpoint", "Bert", task="TokenClassification")
    import_hf(root / "checkpoint", root / "names")
    return exported_from(root / "names")


class TestParity:
    def test_embeddings_of_texts(self, of_texts):
        expected = of_texts.torch().embed(MIXED)
        backbone = of_texts.onnx()
        assert (backbone.dimensions, backbone.device) == (expected.shape[1], "cpu")
        for batch_size in (1, 3, 32):
            got = backbone.embed(MIXED, batch_size=batch_size)
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
        assert np.ptp(expected, axis=0).max() > 0.1  # or anything would do

    def test_labels_of_texts(self, of_texts):
        original, artifact = of_texts.torch(), of_texts.artifact
        logits = artifact.logits(original.embed(MIXED))  # [texts, C]
        best = np.sort(logits, axis=1)
        for precision in GRAPH_FILES:
            found = artifact.logits(of_texts.onnx(precision).embed(MIXED))
            decided = best[:, -1] - best[:, -2] > 2 * np.abs(found - logits).max()
            assert decided.sum() > len(MIXED) // 2
            assert (found.argmax(axis=1) == logits.argmax(axis=1))[decided].all()

    def test_half_precision_is_stored_only(self, of_texts):
        expected = of_texts.onnx("fp32").embed(MIXED)
        got = of_texts.onnx("fp16").embed(MIXED)
        difference = np.abs(got - expected).max()
        assert 1e-6 < difference < 1e-2 * np.abs(expected).max()
        whole, half = (onnx.load(of_texts.backbone / GRAPH_FILES[name]) for name in GRAPH_FILES)
        assert not [i for i in whole.graph.initializer if i.data_type == TensorProto.FLOAT16]
        halved = [item for item in half.graph.initializer if item.data_type == TensorProto.FLOAT16]
        assert len(halved) == sum(node.op_type == "Cast" for node in half.graph.node) - sum(
            node.op_type == "Cast" for node in whole.graph.node
        )
        assert halved
        assert [out.type.tensor_type.elem_type for out in half.graph.output] == [TensorProto.FLOAT]

    @pytest.mark.parametrize("stride", [None, 3])
    def test_embeddings_of_tokens(self, of_tokens, stride):
        expected = of_tokens.torch().embed_tokens(MIXED, stride=stride)
        got = of_tokens.onnx().embed_tokens(MIXED, stride=stride)
        assert [len(windows) for windows in got] == [len(windows) for windows in expected]
        for ours, theirs in zip(chain(*got), chain(*expected), strict=True):
            assert ours.tokens == theirs.tokens
            np.testing.assert_allclose(ours.embeddings, theirs.embeddings, rtol=0, atol=1e-5)
        assert (max(map(len, got)) > 1) == (stride is not None)

    def test_pieces_are_joined_alike(self, of_tokens):
        pieces = ["mild", "##ly", "severe", "pain", "##s"]
        assert (
            of_tokens.onnx().join(pieces)
            == of_tokens.torch().join(pieces)
            == ("mildly severe pains")
        )

    @pytest.mark.slow
    def test_minilm(self, tmp_path):
        directory, section = minilm()
        weight = np.random.default_rng(3).normal(size=(22, 384)) * 5
        head = HeadArtifact.from_weights(weight, None, [str(label) for label in range(22)])
        head.with_backbone(directory, section).save(tmp_path / "chapters")
        found = exported_from(tmp_path / "chapters")
        texts = [*MIXED, "acute chest pain", "a much longer sentence about a broken arm"]
        expected = found.torch().embed(texts)
        logits = found.artifact.logits(expected)
        for precision, limit in (("fp32", 1e-5), ("fp16", 2e-3)):
            got = found.onnx(precision).embed(texts)
            np.testing.assert_allclose(got, expected, rtol=0, atol=limit)
            assert (found.artifact.logits(got).argmax(axis=1) == logits.argmax(axis=1)).all()
        sizes = {item.precision: item.bytes for item in found.parities}
        assert sizes["fp16"] < 0.51 * sizes["fp32"]
        assert found.artifact.backbone.onnx.tokenizer.bytes < 500_000


class TestTokenizer:
    @pytest.mark.parametrize("max_length", [2, 3, 32])
    def test_ids_are_those_of_transformers(self, of_texts, max_length):
        theirs = of_texts.torch().tokenizer
        ours = PlainTokenizer((of_texts.backbone / TOKENIZER_FILE).read_bytes())
        clean = [text.encode("utf-8", "replace").decode() for text in MIXED]
        expected = theirs(
            clean,
            truncation=True,
            max_length=max_length,
            return_special_tokens_mask=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        got = ours(clean, max_length=max_length)
        for column in ("input_ids", "token_type_ids", "special_tokens_mask"):
            assert got[column] == expected[column]
        assert max(map(len, got["input_ids"])) == max_length
        assert [list(map(tuple, row)) for row in got["offset_mapping"]] == [
            list(map(tuple, row)) for row in expected["offset_mapping"]
        ]

    def test_it_says_what_transformers_says(self, of_texts):
        theirs = of_texts.torch().tokenizer
        ours = PlainTokenizer((of_texts.backbone / TOKENIZER_FILE).read_bytes())
        assert ours.num_special_tokens_to_add() == theirs.num_special_tokens_to_add()
        for name in ("unk_token_id", "pad_token_id", "pad_token_type_id", "padding_side"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert [ours.convert_ids_to_tokens(number) for number in range(20)] == [
            theirs.convert_ids_to_tokens(number) for number in range(20)
        ]

    def test_one_that_says_nothing_of_length_is_refused(self, of_texts):
        content = json.loads((of_texts.backbone / TOKENIZER_FILE).read_text())
        for part in ("truncation", "padding"):
            with pytest.raises(ValueError, match="cut and padded"):
                PlainTokenizer(json.dumps(content | {part: None}).encode())


class TestExport:
    def test_the_rest_of_the_artefact_stays(self, of_texts, tmp_path):
        assert json.loads((of_texts.directory / "report.json").read_text())["how"] == "it was made"
        section = of_texts.artifact.backbone
        assert {entry.path for entry in section.onnx.files} == {
            TOKENIZER_FILE,
            *GRAPH_FILES.values(),
        }
        assert not {entry.path for entry in section.files} & {TOKENIZER_FILE}
        again = HeadArtifact.load(of_texts.directory)
        assert again.manifest.digest == of_texts.artifact.manifest.digest

    def test_nothing_of_this_machine_is_in_the_graph(self, of_texts):
        for path in GRAPH_FILES.values():
            model = onnx.load(of_texts.backbone / path)
            for weight in model.graph.initializer:
                weight.ClearField("raw_data")
            rest = model.SerializeToString()
            assert b"input_ids" in rest
            for word in (b".py", b"/tmp", b"site-packages", b"Roberta", b"torch.nn"):
                assert word not in rest, word
            assert {node.domain for node in model.graph.node} == {""}
            assert not model.functions
            assert not any(item.external_data for item in model.graph.initializer)

    def test_what_it_says_of_itself(self, of_texts):
        whole, half = of_texts.parities
        assert whole.embedding_difference < 1e-5 < half.embedding_difference
        assert whole.same_labels
        assert whole.logit_difference < 1e-4
        assert whole.bytes == (of_texts.backbone / GRAPH_FILES["fp32"]).stat().st_size
        assert "top labels are the same" in whole.render()

    def test_an_export_that_differs_is_refused(self, of_texts, tmp_path, monkeypatch):
        """What exporters get wrong without a word: here, weights that half precision halves."""
        copy = tmp_path / "triage"
        shutil.copytree(of_texts.directory, copy)
        before = (copy / "manifest.json").read_bytes()

        def wrong(original):
            model = onnx.load(of_texts.backbone / GRAPH_FILES["fp32"])
            largest = max(model.graph.initializer, key=lambda item: item.ByteSize())
            values = onnx.numpy_helper.to_array(largest) * 1.01
            largest.CopyFrom(onnx.numpy_helper.from_array(values, largest.name))
            return model

        monkeypatch.setattr(onnx_export, "_graph", wrong)
        with pytest.raises(BackboneError, match="other embeddings"):
            export_onnx(copy)
        assert (copy / "manifest.json").read_bytes() == before

    @pytest.mark.parametrize("precisions", [(), ("fp8",), ("fp32", "int8")])
    def test_unknown_precisions_are_refused(self, of_texts, precisions):
        with pytest.raises(BackboneError, match="fp32, fp16"):
            export_onnx(of_texts.directory, precisions=precisions)

    def test_without_a_backbone_there_is_nothing_to_export(self, tmp_path):
        HeadArtifact.from_weights(np.eye(3), None, ["a", "b", "c"]).save(tmp_path / "bare")
        with pytest.raises(BackboneError, match="no backbone"):
            export_onnx(tmp_path / "bare")

    def test_weights_that_half_precision_cannot_hold_stay(self):
        large = np.full((32, 32), 70_000, dtype=np.float32)
        weights = {"large": large, "small": np.ones(3, dtype=np.float32), "ordinary": large / 1e5}
        graph = helper.make_graph(
            [helper.make_node("Identity", ["ordinary"], ["out"])],
            "g",
            [],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, [32, 32])],
            [onnx.numpy_helper.from_array(values, name) for name, values in weights.items()],
        )
        made = onnx_export.halved(helper.make_model(graph))
        types = {item.name: item.data_type for item in made.graph.initializer}
        assert types == {
            "large": TensorProto.FLOAT,
            "small": TensorProto.FLOAT,
            "ordinary.half": TensorProto.FLOAT16,
        }


def graph_of(
    name,
    location=None,
    *,
    inputs=("input_ids", "attention_mask"),
    shape=("b", 16),
    kind=TensorProto.FLOAT,
):
    """A graph of the right form, whose weight is outside of it at `location`."""
    weight = onnx.numpy_helper.from_array(
        np.ones(16, dtype=helper.tensor_dtype_to_np_dtype(kind)), "w"
    )
    if location is not None:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "64")):
            entry = weight.external_data.add()
            entry.key, entry.value = key, value
    nodes = [
        helper.make_node("Cast", ["attention_mask"], ["m"], to=kind),
        helper.make_node("ReduceSum", ["m"], ["s"], keepdims=1),
        helper.make_node("Mul", ["s", "w"], [name]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(key, TensorProto.INT64, ["b", "t"]) for key in inputs],
        [helper.make_tensor_value_info(name, kind, shape)],
        [weight],
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


class TestLoad:
    @pytest.fixture
    def with_graph(self, of_texts, tmp_path):
        """The backbone with another graph, which is pinned as its own."""

        def make(content):
            copy = tmp_path / "backbone"
            shutil.copytree(of_texts.backbone, copy)
            (copy / GRAPH_FILES["fp32"]).write_bytes(content)
            section = of_texts.artifact.backbone
            entry = describe_file(copy, GRAPH_FILES["fp32"])
            onnx_section = section.onnx.model_copy(update={"fp32": entry})
            return copy, section.model_copy(update={"onnx": onnx_section})

        return make

    @pytest.mark.parametrize("path", [TOKENIZER_FILE, GRAPH_FILES["fp32"]])
    def test_a_changed_file_is_refused_before_it_is_read(
        self, of_texts, tmp_path, path, monkeypatch
    ):
        copy = tmp_path / "backbone"
        shutil.copytree(of_texts.backbone, copy)
        content = bytearray((copy / path).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / path).write_bytes(content)
        monkeypatch.setattr(onnx_backbone, "_session", None)
        monkeypatch.setattr(onnx_backbone, "PlainTokenizer", None)
        with pytest.raises(BackboneError, match="SHA-256"):
            OnnxBackbone.load(copy, of_texts.artifact.backbone)

    def test_only_its_own_two_files_are_needed(self, of_texts, tmp_path):
        section = of_texts.artifact.backbone
        for entry in onnx_files(section, "fp16"):
            (tmp_path / entry.path).parent.mkdir(exist_ok=True)
            shutil.copy(of_texts.backbone / entry.path, tmp_path / entry.path)
        backbone = OnnxBackbone.load(tmp_path, section, precision="fp16", device="cpu")
        assert (backbone.embed(TEXTS) == of_texts.onnx("fp16").embed(TEXTS)).all()

    @pytest.mark.parametrize("location", ["w.bin", "../w.bin", "absolute", "*/_ORT_MEM_ADDR_/*"])
    def test_weights_in_other_files_are_refused(self, with_graph, tmp_path, monkeypatch, location):
        np.ones(16, dtype=np.float32).tofile(tmp_path / "w.bin")
        (tmp_path / "here").mkdir()
        shutil.copy(tmp_path / "w.bin", tmp_path / "here" / "w.bin")
        monkeypatch.chdir(tmp_path / "here")
        absolute = str(tmp_path / "w.bin")
        directory, section = with_graph(
            graph_of("out", absolute if location == "absolute" else location)
        )
        (directory / "onnx" / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes())
        with pytest.raises(BackboneError, match="in the file itself"):
            OnnxBackbone.load(directory, section, device="cpu")

    def test_the_same_graph_with_its_weights_inside_is_loaded(self, with_graph):
        directory, section = with_graph(graph_of("out"))
        backbone = OnnxBackbone.load(directory, section, device="cpu")
        assert backbone.embed(["acute pain"]).shape == (1, 16)

    @pytest.mark.parametrize(
        "content",
        [
            graph_of("out", inputs=("attention_mask",)),
            graph_of("out", inputs=("input_ids", "attention_mask", "token_type_ids")),
            graph_of("out", kind=TensorProto.DOUBLE),
            graph_of("out", shape=("b", "t", 16)),
        ],
    )
    def test_a_graph_of_another_form_is_refused(self, with_graph, content):
        directory, section = with_graph(content)
        with pytest.raises(BackboneError, match="expected"):
            OnnxBackbone.load(directory, section, device="cpu")

    @pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x01" * 50])
    def test_what_is_no_graph_is_refused(self, with_graph, content):
        directory, section = with_graph(content)
        with pytest.raises(BackboneError, match="cannot be loaded"):
            OnnxBackbone.load(directory, section, device="cpu")

    def test_without_the_form_it_says_what_to_do(self, tiny):
        with pytest.raises(BackboneError, match="export-onnx"):
            onnx_files(tiny.section)

    def test_single_precision_comes_first(self, of_texts):
        onnx_section = of_texts.artifact.backbone.onnx
        assert onnx_files(of_texts.artifact.backbone)[1] == onnx_section.fp32
        assert onnx_files(of_texts.artifact.backbone, "fp16")[1] == onnx_section.fp16
        only_half = of_texts.artifact.backbone.model_copy(
            update={"onnx": onnx_section.model_copy(update={"fp32": None})}
        )
        assert onnx_files(only_half)[1] == onnx_section.fp16
        with pytest.raises(BackboneError, match="in fp32"):
            onnx_files(only_half, "fp32")

    def test_texts_and_tokens_are_not_confused(self, of_texts, of_tokens):
        with pytest.raises(BackboneError, match="tokens"):
            of_tokens.onnx().embed(["a"])
        with pytest.raises(BackboneError, match="whole texts"):
            of_texts.onnx().embed_tokens(["a"])

    @pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "cuda:x", "nowhere"])
    def test_a_device_that_does_not_exist_is_named(self, of_texts, device):
        with pytest.raises(BackboneError, match=f"'{device}'"):
            OnnxBackbone.load(of_texts.backbone, of_texts.artifact.backbone, device=device)

    @pytest.mark.parametrize(
        ("device", "expected"),
        [
            ("auto", ("cuda", "CUDAExecutionProvider", "0")),
            ("cuda", ("cuda", "CUDAExecutionProvider", "0")),
            ("cuda:1", ("cuda:1", "CUDAExecutionProvider", "1")),
            ("cpu", ("cpu", "CPUExecutionProvider", None)),
        ],
    )
    def test_devices_are_named_as_onnxruntime_names_them(self, device, expected):
        available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        chosen, providers = onnx_backbone._providers(device, available)
        name, options = providers[0]
        assert (chosen, name, options.get("device_id")) == expected
        assert onnx_backbone._providers("auto", available[1:])[0] == "cpu"

    def test_it_takes_the_cores_that_it_may_use(self, of_texts):
        options = of_texts.onnx()._session.get_session_options()
        assert options.intra_op_num_threads == len(os.sched_getaffinity(0))

    def test_neither_torch_nor_transformers_is_imported(self, of_texts):
        script = (
            "import sys\n"
            "for name in ('torch', 'transformers', 'safetensors', 'onnx', 'onnxscript'):\n"
            "    sys.modules[name] = None\n"
            "from veilhead_models.onnx_backbone import OnnxBackbone\n"
            "from veilhead_protocol.manifest import Manifest\n"
            "from pathlib import Path\n"
            "manifest = Manifest.deserialize(Path(sys.argv[1], 'manifest.json').read_bytes())\n"
            "files = Path(sys.argv[1], 'backbone')\n"
            "backbone = OnnxBackbone.load(files, manifest.backbone, device='cpu')\n"
            "print(backbone.embed(['acute pain']).shape)\n"
        )
        command = [sys.executable, "-c", script, str(of_texts.directory)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["(1,", f"{of_texts.onnx().dimensions})"]
        assert done.stderr == ""

    def test_without_onnxruntime_it_says_what_to_install(self, of_texts, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(BackboneError, match=r"veilhead\[onnx\]"):
            OnnxBackbone.load(of_texts.backbone, of_texts.artifact.backbone)


def test_a_missing_form_is_missed_when_the_artefact_is_read(of_texts, tmp_path):
    copy = tmp_path / "triage"
    shutil.copytree(of_texts.directory, copy)
    (copy / BACKBONE_DIRECTORY / GRAPH_FILES["fp16"]).unlink()
    with pytest.raises(ArtifactError, match=r"model\.fp16\.onnx"):
        HeadArtifact.load(copy)
