"""What the backbone gets to see when de-identification is on, and what turns it on."""

from __future__ import annotations

import logging
import re
import sys

import numpy as np
import pytest

from veilhead import BatchError, Client, ClientError, DeidentifyError
from veilhead.deidentify import Deidentifier, Finding
from veilhead.rows import embed_token_rows
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import Backbone, describe
from veilhead_models.embedder import Token, TokenWindow
from veilhead_protocol.manifest import PolicySection

TEXT = "pain since 4 May, mail jane@example.com"
SAFE = "pain since 4 May, mail [EMAIL_1]"


@pytest.fixture
def seen(monkeypatch):
    """Every text that a backbone embeds."""
    texts = []
    embed = Backbone.embed_batches

    def spy(self, rows, **options):
        texts.extend(rows)
        return embed(self, rows, **options)

    monkeypatch.setattr(Backbone, "embed_batches", spy)
    return texts


@pytest.fixture(scope="module")
def careful_artifact(tmp_path_factory, tiny_directory):
    """The directory of a model whose policy asks for de-identification."""
    weight = np.random.default_rng(5).normal(size=(2, 16))
    head = HeadArtifact.from_weights(
        weight, None, ["red", "green"], policy=PolicySection(deidentify=True)
    )
    directory = tmp_path_factory.mktemp("artifacts") / "careful"
    head.with_backbone(tiny_directory, describe(tiny_directory)).save(directory)
    return directory


@pytest.fixture
def local():
    """Clients of services in this process; closed in the end."""
    clients = []

    def make(directory, **options):
        clients.append(Client.local(directory, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def ask_in_every_way(client):
    client.classify(TEXT)
    client.classify([TEXT])
    client.embed([TEXT])


def test_it_is_off_by_default(connect, text_artifact, seen):
    client, _ = connect(text_artifact)
    ask_in_every_way(client)
    assert seen == [TEXT] * 3
    assert client.deidentifier is None


def test_an_argument_turns_it_on(connect, text_artifact, seen):
    client, _ = connect(text_artifact, deidentify=True)
    ask_in_every_way(client)
    assert seen == [SAFE] * 3
    assert isinstance(client.deidentifier, Deidentifier)


def test_the_policy_turns_it_on_and_says_so(local, careful_artifact, seen, caplog):
    with caplog.at_level(logging.INFO, logger="veilhead"):
        client = local(careful_artifact)
    assert "de-identified" in caplog.text
    assert "careful" in caplog.text
    ask_in_every_way(client)
    assert seen == [SAFE] * 3


def test_the_user_has_the_last_word(local, careful_artifact, seen):
    client = local(careful_artifact, deidentify=False)
    ask_in_every_way(client)
    assert seen == [TEXT] * 3


class Pain:
    def find(self, text):
        yield Finding(text.index("pain"), text.index("pain") + 4, "SYMPTOM", "pain")


def test_detectors_of_ones_own(local, careful_artifact, seen):
    client = local(careful_artifact, deidentify=Deidentifier([Pain()]))
    ask_in_every_way(client)
    assert seen == ["[SYMPTOM_1] since 4 May, mail jane@example.com"] * 3


def test_a_text_whose_detector_failed_is_never_embedded(connect, text_artifact, seen):
    client, service = connect(text_artifact, deidentify=Deidentifier([Pain()]))
    with pytest.raises(DeidentifyError):
        client.classify("jane@example.com")
    with pytest.raises(BatchError) as caught:
        client.classify(["pain", "jane@example.com", "pain"])
    assert list(caught.value.errors) == [1]
    assert isinstance(caught.value.errors[1], DeidentifyError)
    assert not any("jane" in text for text in seen)
    # The service sees no difference: as many queries as of good rows.
    assert len(service.seen("infer")) == 1 + len(client._engine.session.plan(3))


def test_without_its_package_nothing_is_classified(local, careful_artifact, monkeypatch):
    monkeypatch.setitem(sys.modules, "phonenumbers", None)
    with pytest.raises(ClientError, match="pip install"):
        local(careful_artifact)
    client = local(careful_artifact, deidentify=False)
    assert client.deidentifier is None


class Words:
    """A backbone whose tokens are words."""

    dimensions = 4

    def count_tokens(self, text, *, stride):
        return len(re.findall(r"\w+", text))

    def embed_tokens(self, texts, *, stride):
        (text,) = texts
        tokens = [
            Token(match[0], place, match.start(), match.end(), continues=False)
            for place, match in enumerate(re.finditer(r"\w+", text))
        ]
        return [[TokenWindow(np.zeros((len(tokens), 4)), tuple(tokens))]]


def test_tokens_stand_where_they_stood_in_the_original():
    text = "severe pain mail jane@example.com acute fever"
    rows = embed_token_rows(Words(), text, 0, None, Deidentifier())
    assert rows.error is None
    (tokens,) = rows.windows
    assert [token.piece for token in tokens] == [
        *("severe", "pain", "mail", "EMAIL_1", "acute", "fever")
    ]
    assert [text[token.start : token.end] for token in tokens] == text.split()


def test_tokens_of_a_text_whose_detector_failed_are_never_embedded():
    rows = embed_token_rows(Words(), "acute", 0, None, Deidentifier([Pain()]))
    assert isinstance(rows.error, DeidentifyError)
    assert rows.windows == []
