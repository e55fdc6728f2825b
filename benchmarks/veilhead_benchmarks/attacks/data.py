"""Embeddings to attack: of published data sets, made once and kept in the cache."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from veilhead_models.backbone import Backbone, minilm
from veilhead_models.datasets import Dataset, load_dataset
from veilhead_protocol.files import cache_directory


@dataclass(frozen=True, eq=False)
class Embedded:
    """A data set's embeddings.

    Attributes:
        train: [train rows, d], norm one.
        test: [test rows, d].
        dataset: the texts and targets.
    """

    train: NDArray[np.float64]
    test: NDArray[np.float64]
    dataset: Dataset

    @property
    def classes(self) -> int:
        """Number of labels."""
        return len(self.dataset.labels)

    @property
    def pool(self) -> tuple[NDArray[np.float64], NDArray[np.intp], tuple[str, ...]]:
        """Embeddings, targets and texts of both splits together."""
        train, test = self.dataset.train, self.dataset.test
        return (
            np.concatenate([self.train, self.test]),
            np.concatenate([train.targets, test.targets]),
            train.texts + test.texts,
        )


@lru_cache(maxsize=1)
def backbone() -> Backbone:
    """MiniLM, loaded once."""
    directory, section = minilm()
    return Backbone.load(directory, section)


@lru_cache(maxsize=2)
def embedded(name: str) -> Embedded:
    """A published data set with its MiniLM embeddings."""
    dataset = load_dataset(name)
    texts = dataset.train.texts + dataset.test.texts
    _, section = minilm()
    digest = hashlib.sha256(section.model_dump_json().encode("utf-8"))
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8", "replace")).digest())
    cached = cache_directory() / "embeddings" / f"{name}-{digest.hexdigest()[:32]}.npy"
    if cached.is_file():
        embeddings = np.load(cached, allow_pickle=False).astype(np.float64)
    else:
        embeddings = backbone().embed(texts)
        cached.parent.mkdir(parents=True, exist_ok=True)
        staging = cached.with_suffix(".new.npy")
        np.save(staging, embeddings.astype(np.float32))
        staging.replace(cached)
    rows = len(dataset.train.texts)
    return Embedded(embeddings[:rows], embeddings[rows:], dataset)
