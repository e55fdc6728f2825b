"""Heads of the size that trained ones have, and a client and a service for them without HTTP."""

from __future__ import annotations

import numpy as np

from veilhead_benchmarks.attacks.pair import Pair
from veilhead_models.artifact import HeadArtifact

__all__ = ["Pair", "artifact", "unit_rows"]


def artifact(classes, dimensions, *, parameters="standard", seed=1, scale=0.5, name="model"):
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
