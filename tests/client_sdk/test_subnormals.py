"""No thread that runs a backbone computes with subnormal numbers: they are slow, and so tell."""

from __future__ import annotations

import json
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from veilhead import Client
from veilhead.subnormals import _FLAGS, flush_subnormals
from veilhead_models import onnx_backbone
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import describe
from veilhead_models.onnx_backbone import _session

SIZE = 512  # so much work that it is shared among threads


def graph():
    """Products with subnormal weights, and subnormal products, both large again in the end."""
    constants = {
        "weights": np.full((SIZE, SIZE), 1e-39, np.float32),
        "small": np.array(1e-39, np.float32),
        "large": np.array(1e36, np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "weights"], ["sums"]),
        helper.make_node("Mul", ["sums", "large"], ["of_weights"]),
        helper.make_node("Mul", ["x", "small"], ["products"]),
        helper.make_node("Mul", ["products", "large"], ["of_activations"]),
    ]
    shape = ["b", SIZE]
    made = helper.make_graph(
        nodes,
        "subnormal",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name in ("of_weights", "of_activations")
        ],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    opset = helper.make_opsetid("", 17)
    return helper.make_model(made, opset_imports=[opset], ir_version=8).SerializeToString()


def by_onnx():
    """The share of results that are not zero, by ONNX Runtime as a backbone runs it."""
    session = _session(graph(), [("CPUExecutionProvider", {})], flush_subnormals=True)
    found = session.run(None, {"x": np.ones((SIZE, SIZE), np.float32)})
    return [float(np.mean(values != 0)) for values in found]


def by_torch():
    torch.set_num_threads(2)
    x = torch.ones(SIZE, SIZE)
    sums = (x @ torch.full((SIZE, SIZE), 1e-39)) * 1e36
    products = torch.nn.functional.gelu(x * 1e-39) * 1e36
    return [float((values != 0).float().mean()) for values in (sums, products)]


def by_numpy():
    double, single = np.full(SIZE, 1e-310), np.full(SIZE, 1e-39, np.float32)
    return [float(np.mean(double * 1e20 != 0)), float(np.mean(single.astype(np.float64) != 0))]


def on_a_thread(work, **options):
    with ThreadPoolExecutor(1, **options) as thread:
        return thread.submit(work).result()


pytestmark = pytest.mark.skipif(
    platform.machine() not in _FLAGS, reason="nobody has looked up the flags of this processor"
)


@pytest.mark.parametrize("work", [by_torch, by_onnx, by_numpy])
def test_a_thread_that_flushes_them_and_its_own_threads_compute_with_zeros(work, monkeypatch):
    # Twice: of a process's sessions ONNX Runtime lets the first alone set the thread that makes it.
    for _ in range(2):
        assert on_a_thread(work, initializer=flush_subnormals) == [0.0, 0.0]
    # The calling thread computes too, with whatever it is set to; here ONNX Runtime has no other.
    monkeypatch.setattr(onnx_backbone.os, "sched_getaffinity", lambda process: {0})
    assert on_a_thread(work)[0] > 0.4


def test_other_threads_are_left_as_they_were():
    assert on_a_thread(flush_subnormals) is True
    assert on_a_thread(by_numpy) == by_numpy() == [1.0, 1.0]


def test_elsewhere_nothing_is_changed(monkeypatch):
    monkeypatch.setattr("veilhead.subnormals.platform.machine", lambda: "riscv64")
    assert on_a_thread(lambda: (flush_subnormals(), *by_numpy())) == (False, 1.0, 1.0)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tiny_directory):
    """A model whose backbone has two dense layers: subnormal numbers, and large ones after them."""
    root = tmp_path_factory.mktemp("subnormal")
    source = root / "backbone"
    shutil.copytree(tiny_directory, source)
    kinds = ["Transformer", "Pooling", "Dense", "Dense"]
    paths = ["", "1_Pooling", "2_Dense", "3_Dense"]
    prefix = "sentence_transformers.models"
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"{prefix}.{kind}"}
        for place, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    for path in paths[1:]:
        (source / path).mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    torch.manual_seed(5)
    for path, weight in (("2_Dense", torch.randn(SIZE, 16) * 1e-39), ("3_Dense", None)):
        tensor = torch.full((16, SIZE), 1e37) if weight is None else weight
        save_file({"linear.weight": tensor}, source / path / "model.safetensors")
        (source / path / "config.json").write_text(
            '{"activation_function": "torch.nn.modules.linear.Identity", "bias": false}'
        )
    head = HeadArtifact.from_weights(np.eye(16), np.zeros(16), [f"{row}" for row in range(16)])
    head.with_backbone(source, describe(source, normalise=False)).save(root / "model")
    return root / "model"


def embeddings(artifact):
    with Client.local(artifact, device="cpu", backbone_runtime="torch") as client:
        return client.embed([f"acute {'pain ' * (number % 7)}" for number in range(64)])


def test_a_backbone_of_subnormal_numbers_embeds_zeros_and_cannot_tell_by_them(
    artifact, monkeypatch
):
    assert not embeddings(artifact).any()
    # Either protection is enough for torch.
    monkeypatch.setattr(torch, "set_flush_denormal", lambda mode: None)
    assert not embeddings(artifact).any()
    monkeypatch.setattr("veilhead.async_client.flush_subnormals", lambda: False)
    assert np.abs(embeddings(artifact)).max() > 1e-6
