from __future__ import annotations

import asyncio
import subprocess

import httpx2
import numpy as np
import pytest
from support.backbones import WORDS
from support.clients import Driven
from support.heads import artifact
from support.services import ScriptedService, running

from veilhead import Client
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import describe
from veilhead_service.model_store import SingleModel, publish


@pytest.fixture(scope="session")
def text_artifact(tmp_path_factory, tiny_directory):
    """The directory of a model for texts: the tiny backbone and a head of four classes."""
    weight = np.random.default_rng(5).normal(size=(4, 16))
    head = HeadArtifact.from_weights(weight, np.zeros(4), ["red", "green", "blue", "grey"])
    directory = tmp_path_factory.mktemp("artifacts") / "colours"
    head.with_backbone(tiny_directory, describe(tiny_directory)).save(directory)
    return directory


@pytest.fixture(scope="session")
def problem_artifacts(tmp_path_factory, tiny_directory):
    """Directories of models for texts whose labels do not exclude each other, and of numbers."""
    found = {}
    for problem_type, labels in (("multi_label", ["hot", "wet", "loud"]), ("regression", ["age"])):
        weight = np.random.default_rng(7).normal(size=(len(labels), 16))
        head = HeadArtifact.from_weights(
            weight, np.zeros(len(labels)), labels, problem_type=problem_type
        )
        found[problem_type] = tmp_path_factory.mktemp("artifacts") / problem_type
        described = head.with_backbone(tiny_directory, describe(tiny_directory))
        described.save(found[problem_type])
    return found


@pytest.fixture(scope="session")
def head_artifact(tmp_path_factory):
    """The directory of a model for embeddings: 32 dimensions, five classes."""
    directory = tmp_path_factory.mktemp("artifacts") / "model"
    artifact(5, 32).save(directory)
    return directory


@pytest.fixture(scope="session")
def compact_artifact(tmp_path_factory):
    """The directory of the same model under the other parameter set."""
    directory = tmp_path_factory.mktemp("artifacts") / "small"
    artifact(5, 32, parameters="compact", name="small").save(directory)
    return directory


@pytest.fixture(scope="session")
def served(text_artifact, head_artifact, compact_artifact, problem_artifacts, tmp_path_factory):
    """The URL of a real service of all these models, in a process of its own."""
    store = tmp_path_factory.mktemp("served") / "store"
    for directory in (text_artifact, head_artifact, compact_artifact, *problem_artifacts.values()):
        publish(directory, store)
    with running(store, "--workers", "1", log=subprocess.DEVNULL) as url:
        yield url


@pytest.fixture(params=["Client", "AsyncClient"])
def make_client(request):
    """Makes a client: every test that asks for one is run with both."""
    return {"Client": Client, "AsyncClient": Driven}[request.param]


@pytest.fixture
def connect(served, make_client):
    """Clients of the real service behind a scripted transport; closed in the end."""
    clients = []

    def make(directory, *, model=None, **options):
        (name,) = SingleModel(directory).names()
        service = ScriptedService(httpx2.AsyncHTTPTransport())
        client = make_client(served, model or name, transport=service, **options)
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


@pytest.fixture
def quick(monkeypatch):
    """Retries without waiting; the pauses that would have been made."""
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)
        await asyncio.sleep(0)

    monkeypatch.setattr("veilhead.transport.anyio.sleep", sleep)
    return pauses
