"""Heads of the size that trained ones have, and a client and a service for them without HTTP."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from veilhead.session import Session
from veilhead_models.artifact import HeadArtifact
from veilhead_service.encrypted_head import ClientKey, EncryptedHead


def artifact(classes, dimensions, *, parameters="compact", seed=1, scale=0.5, name="model"):
    generator = np.random.default_rng(seed)
    return HeadArtifact.from_weights(
        generator.normal(scale=scale, size=(classes, dimensions)),
        generator.normal(size=classes),
        [f"label {index}" for index in range(classes)],
        name=name,
        parameters=parameters,
    )


def unit_rows(rows, dimensions, *, seed=2):
    embeddings = np.random.default_rng(seed).normal(size=(rows, dimensions))
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


@dataclass
class Pair:
    """A session and the head that answers it."""

    artifact: HeadArtifact
    session: Session
    head: EncryptedHead

    @classmethod
    def of(cls, artifact):
        manifest = artifact.manifest
        head = EncryptedHead(manifest, artifact.weight, artifact.bias)
        return cls(artifact, Session(manifest), head)

    def answer(self, query):
        return self.head.evaluate(query.data, ClientKey.from_message(query.key.message))
