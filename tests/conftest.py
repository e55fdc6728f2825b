"""Fixtures for every test."""

from __future__ import annotations

from pathlib import Path

import pytest

from veilhead_models.backbone import Backbone, describe


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved BERT with random weights: 16 dimensions, one layer, eleven words."""
    from support.backbones import save_tiny_bert  # torch, which most tests do without

    directory = tmp_path_factory.mktemp("backbones") / "tiny-bert"
    save_tiny_bert(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tiny_directory: Path) -> Backbone:
    return Backbone.load(tiny_directory, describe(tiny_directory), device="cpu")
