from __future__ import annotations

import numpy as np
import pytest
from support.backbones import WORDS
from support.heads import artifact
from support.services import ScriptedService

from veilhead import Client
from veilhead.local import InProcessTransport
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import describe
from veilhead_service.app import create_app
from veilhead_service.model_store import SingleModel
from veilhead_service.settings import Settings


@pytest.fixture(scope="session")
def text_artifact(tmp_path_factory, tiny_directory):
    """The directory of a model for texts: the tiny backbone and a head of four classes."""
    weight = np.random.default_rng(5).normal(size=(4, 16))
    head = HeadArtifact.from_weights(weight, np.zeros(4), ["red", "green", "blue", "grey"])
    directory = tmp_path_factory.mktemp("artifacts") / "colours"
    head.with_backbone(tiny_directory, describe(tiny_directory)).save(directory)
    return directory


@pytest.fixture(scope="session")
def head_artifact(tmp_path_factory):
    """The directory of a model for embeddings: 32 dimensions, five classes."""
    directory = tmp_path_factory.mktemp("artifacts") / "model"
    artifact(5, 32).save(directory)
    return directory


@pytest.fixture
def connect():
    """Clients of real in-process services behind a scripted transport; closed in the end."""
    clients = []

    def make(directory, *, model=None, **options):
        models = SingleModel(directory)
        (name,) = models.names()
        app = create_app(Settings(workers=1, insecure_no_tenants=True), models=models)
        service = ScriptedService(InProcessTransport(app))
        client = Client("http://127.0.0.1", model or name, transport=service, **options)
        clients.append(client)
        return client, service

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def texts():
    """A hundred different texts of words that the tiny backbone knows."""
    generator = np.random.default_rng(6)
    return [" ".join(generator.choice(WORDS, size=5)) for _ in range(100)]
