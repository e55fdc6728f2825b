"""A client without torch, against a real service that publishes the ONNX form."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.services import ScriptedService, running
from typer.testing import CliRunner

from veilhead import Client
from veilhead.local import InProcessTransport
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import describe
from veilhead_models.onnx_export import GRAPH_FILES, TOKENIZER_FILE
from veilhead_protocol.errors import BackboneError
from veilhead_service.app import create_app
from veilhead_service.cli import app as server
from veilhead_service.model_store import SingleModel, publish
from veilhead_service.settings import Settings

TEXTS = ["acute chest pain", "mild fever", "", "broken arm " * 30]


def save_colours(directory, backbone):
    weight = np.random.default_rng(5).normal(size=(4, 16)) * 3
    head = HeadArtifact.from_weights(weight, np.zeros(4), ["red", "green", "blue", "grey"])
    head.with_backbone(backbone, describe(backbone)).save(directory)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tiny_directory):
    """A model whose ONNX form the vendor's own command made, in both precisions."""
    directory = tmp_path_factory.mktemp("light") / "colours"
    save_colours(directory, tiny_directory)
    command = ["export-onnx", str(directory), "--precision", "fp32", "--precision", "fp16"]
    result = CliRunner().invoke(server, command)
    assert result.exit_code == 0, result.output
    assert "fp16: " in result.output
    return directory


@pytest.fixture
def connect(tmp_path, monkeypatch):
    monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path / "cache"))
    clients = []

    def make(directory, **options):
        settings = Settings(workers=1, insecure_no_tenants=True)
        service = ScriptedService(
            InProcessTransport(create_app(settings, models=SingleModel(directory)))
        )
        fetched = []
        client = Client(
            "http://127.0.0.1",
            "colours",
            transport=service,
            device="cpu",
            on_download=lambda path, size: fetched.append(path),
            **options,
        )
        clients.append(client)
        return client, fetched

    yield make
    for client in clients:
        client.close()


def without(monkeypatch, *names):
    """As if these packages were not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "veilhead.runtimes.find_spec", lambda name: None if name in names else real(name)
    )


def test_it_answers_as_one_with_torch_does(artifact, connect):
    heavy, files = connect(artifact, backbone_runtime="torch")
    expected = heavy.classify(TEXTS, top_k=None)
    assert TOKENIZER_FILE not in files
    light, files = connect(artifact, backbone_runtime="onnx")
    answers = light.classify(TEXTS, top_k=None)
    assert files == [TOKENIZER_FILE, GRAPH_FILES["fp32"]]
    assert [row[0].label for row in answers] == [row[0].label for row in expected]
    for ours, theirs in zip(answers, expected, strict=True):
        assert [item.score for item in ours] == pytest.approx(
            [item.score for item in theirs], abs=2e-3
        )
    np.testing.assert_allclose(light.embed(TEXTS), heavy.embed(TEXTS), rtol=0, atol=1e-5)


def test_half_precision_is_fetched_when_asked_for(artifact, connect):
    light, files = connect(artifact, backbone_runtime="onnx-fp16")
    whole, _ = connect(artifact, backbone_runtime="onnx")
    assert [row[0].label for row in light.classify(TEXTS)] == [
        row[0].label for row in whole.classify(TEXTS)
    ]
    assert files == [TOKENIZER_FILE, GRAPH_FILES["fp16"]]
    assert 1e-7 < np.abs(light.embed(TEXTS) - whole.embed(TEXTS)).max() < 1e-2


def test_auto_is_torch_where_it_is_installed(artifact, connect, monkeypatch):
    client, files = connect(artifact)
    client.embed(["pain"])
    assert TOKENIZER_FILE not in files
    assert "model.safetensors" in files


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_auto_is_onnx_where_it_is_not(artifact, connect, monkeypatch, missing):
    without(monkeypatch, missing)
    client, files = connect(artifact)
    client.embed(["pain"])
    assert files == [TOKENIZER_FILE, GRAPH_FILES["fp32"]]


def test_with_neither_it_says_what_to_install_and_fetches_nothing(artifact, connect, monkeypatch):
    without(monkeypatch, "torch", "onnxruntime")
    client, files = connect(artifact)
    with pytest.raises(BackboneError, match=r"veilhead\[torch\].*veilhead\[onnx\]"):
        client.embed(["pain"])
    assert files == []


def test_a_model_without_the_form_is_named(connect, tmp_path, tiny_directory, monkeypatch):
    save_colours(tmp_path / "colours", tiny_directory)
    without(monkeypatch, "torch")
    client, files = connect(tmp_path / "colours")
    with pytest.raises(BackboneError, match="export-onnx"):
        client.embed(["pain"])
    assert files == []


def test_an_unknown_runtime_is_refused_before_anything_is_sent(artifact, connect):
    with pytest.raises(ValueError, match="onnx-fp16"):
        connect(artifact, backbone_runtime="tensorflow")


#: The example of docs/light-client.md, where nothing of torch's can be imported.
BLOCKED = """
import sys
for name in ("torch", "transformers", "safetensors", "sklearn", "fastapi", "veilhead_service"):
    sys.modules[name] = None
"""
PAGE = Path(__file__).parents[2] / "docs" / "light-client.md"


def test_the_documented_example_over_http_without_any_of_torchs_packages(
    artifact, connect, tmp_path
):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    publish(artifact, tmp_path / "store")
    with running(tmp_path / "store", log=subprocess.DEVNULL) as url:
        source = example.replace("http://127.0.0.1:8000", url).replace("icd10-chapters", "colours")
        command = [sys.executable, "-c", BLOCKED + source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    client, _ = connect(artifact, backbone_runtime="torch")
    (expected,) = client.classify("acute chest pain")
    assert f"label='{expected.label}'" in done.stdout
