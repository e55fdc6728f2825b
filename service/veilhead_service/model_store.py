"""Published models on disk.

    STORE/<name>/<digest>/    one version: manifest.json, head.safetensors, backbone/
    STORE/<name>/current      the digest that the name stands for

Versions never change: a directory is named by the digest of its manifest and renamed into place
whole. `current` is read at every look-up, so a running service notices what is published.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from veilhead_models.artifact import MANIFEST_FILE, HeadArtifact
from veilhead_protocol.errors import ManifestError, StoreError
from veilhead_protocol.manifest import NAME_PATTERN, Manifest

_CURRENT = "current"
_DIGEST_PATTERN = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredModel:
    """One version of a model, ready to be served."""

    manifest: Manifest
    directory: Path

    @cached_property
    def manifest_bytes(self) -> bytes:
        """The canonical bytes that clients pin."""
        return self.manifest.serialize()

    @classmethod
    def open(cls, directory: Path) -> StoredModel:
        """The version in this directory.

        Raises:
            StoreError: when its manifest cannot be read.
        """
        try:
            manifest = Manifest.deserialize((directory / MANIFEST_FILE).read_bytes())
        except (OSError, ManifestError) as error:
            raise StoreError(f"no readable {MANIFEST_FILE} in {directory}: {error}") from error
        return cls(manifest, directory)


class ModelSource(Protocol):
    """Where the app finds models."""

    def names(self) -> list[str]:
        """The names of all models."""

    def current(self, name: str) -> StoredModel | None:
        """The version that a name stands for, or None."""

    def version(self, name: str, digest: bytes) -> StoredModel | None:
        """The version of this digest, or None."""


class ModelStore:
    """A directory of published models."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._opened: dict[tuple[str, str], StoredModel] = {}

    def names(self) -> list[str]:
        """The names of all models, sorted."""
        return sorted(self._names())

    def _names(self) -> Iterator[str]:
        if not self._root.is_dir():
            return
        for entry in self._root.iterdir():
            if NAME_PATTERN.fullmatch(entry.name) and (entry / _CURRENT).is_file():
                yield entry.name

    def current(self, name: str) -> StoredModel | None:
        """The version that a name stands for, or None when nothing is published under it."""
        if not NAME_PATTERN.fullmatch(name):
            return None
        try:
            digest = (self._root / name / _CURRENT).read_text("ascii").strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StoreError(f"{self._root / name / _CURRENT} cannot be read: {error}") from error
        if not _DIGEST_PATTERN.fullmatch(digest):
            raise StoreError(f"{self._root / name / _CURRENT} does not hold a digest")
        return self._open(name, digest)

    def version(self, name: str, digest: bytes) -> StoredModel | None:
        """The version of this digest under this name, or None."""
        if not NAME_PATTERN.fullmatch(name):
            return None
        return self._open(name, digest.hex())

    def _open(self, name: str, digest: str) -> StoredModel | None:
        known = self._opened.get((name, digest))
        if known is not None:
            return known
        directory = self._root / name / digest
        if not directory.is_dir():
            return None
        model = StoredModel.open(directory)
        if model.manifest.digest.hex() != digest or model.manifest.name != name:
            raise StoreError(f"{directory} holds another model than its name says")
        self._opened[name, digest] = model
        return model


class SingleModel:
    """One artefact directory, served as it lies."""

    def __init__(self, directory: Path) -> None:
        self._model = StoredModel.open(directory)

    def names(self) -> list[str]:
        """The artefact's name."""
        return [self._model.manifest.name]

    def current(self, name: str) -> StoredModel | None:
        """The artefact, when it has this name."""
        return self._model if name == self._model.manifest.name else None

    def version(self, name: str, digest: bytes) -> StoredModel | None:
        """The artefact, when it has this name and digest."""
        return self.current(name) if digest == self._model.manifest.digest else None


def publish(directory: Path, store: Path) -> Manifest:
    """Copy a verified artefact into a store and let its name stand for it.

    Publishing the same artefact again changes nothing.

    Raises:
        ArtifactError: when the directory is not a whole, consistent artefact.
        StoreError: when the store cannot be written.
    """
    artifact = HeadArtifact.load(directory)
    manifest = artifact.manifest
    digest = manifest.digest.hex()
    home = store / manifest.name
    try:
        if not (home / digest).is_dir():
            artifact.save(home / digest)
        pointer = home / f".{_CURRENT}.{os.getpid()}"
        pointer.write_text(digest + "\n", "ascii")
        pointer.replace(home / _CURRENT)
    except OSError as error:
        raise StoreError(f"the store {store} cannot be written: {error}") from error
    return manifest
