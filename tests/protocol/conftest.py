"""What several of these tests need. (Test files cannot import each other.)"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

from veilhead_models.artifact import HeadArtifact

# VEILHEAD_PROPERTY_TESTS=slow looks twenty times as hard.
settings.register_profile("fast", deadline=None, max_examples=50, database=None)
settings.register_profile("slow", deadline=None, max_examples=1000, database=None)
settings.load_profile(os.environ.get("VEILHEAD_PROPERTY_TESTS", "fast"))

VECTORS = Path(__file__).resolve().parent.parent / "vectors"


def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The directory of the golden vectors."""
    return VECTORS


@pytest.fixture(scope="session")
def generator() -> ModuleType:
    """tests/vectors/generate.py, as a module: the specification without our packages."""
    return _load(VECTORS / "generate.py", "veilhead_test_vectors")


@pytest.fixture(scope="session")
def independent() -> ModuleType:
    """The client in plain Python."""
    return _load(Path(__file__).with_name("independent_client.py"), "veilhead_test_independent")


@pytest.fixture(scope="session")
def cases() -> dict[str, dict[str, Any]]:
    """The recorded messages, by the name of their case."""
    return {case["name"]: case for case in json.loads((VECTORS / "messages.json").read_text())}


MakeArtifact = Callable[..., HeadArtifact]


@pytest.fixture(scope="session")
def make_artifact() -> MakeArtifact:
    """A head with random weights of plausible size, like a trained one's."""

    def make(
        classes: int, dimensions: int, parameters: str, *, norm: float = 6.0, seed: int = 0
    ) -> HeadArtifact:
        rng = np.random.default_rng(seed)
        weight = rng.normal(size=(classes, dimensions))
        weight *= norm / np.linalg.norm(weight, axis=1, keepdims=True)
        bias = rng.normal(size=classes)
        labels = [f"class {number}" for number in range(classes)]
        return HeadArtifact.from_weights(weight, bias, labels, name="head", parameters=parameters)

    return make


@pytest.fixture(scope="session")
def unit_rows() -> Callable[[int, int], NDArray[np.float64]]:
    """Random embeddings [count, dimensions] of norm one."""

    def make(count: int, dimensions: int) -> NDArray[np.float64]:
        rows = np.random.default_rng(dimensions).normal(size=(count, dimensions))
        normalised: NDArray[np.float64] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return normalised

    return make
