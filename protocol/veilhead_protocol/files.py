"""Public files by content: their entries in a manifest, the check that they are what it says, and
where fetched ones are kept."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import platformdirs

from veilhead_protocol.errors import BackboneError
from veilhead_protocol.manifest import FileEntry

#: Names the cache directory, instead of the user's own.
CACHE_VARIABLE: Final = "VEILHEAD_CACHE"


def cache_directory() -> Path:
    """Where fetched files are kept: `$VEILHEAD_CACHE`, or the user's cache directory."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("veilhead")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: when it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(directory: Path, path: str) -> FileEntry:
    """The manifest's entry for the file at `path` (relative, with slashes) below `directory`.

    Raises:
        OSError: when it cannot be read.
        pydantic.ValidationError: when the path is not one that a manifest may hold.
    """
    file = directory / path
    return FileEntry(path=path, bytes=file.stat().st_size, sha256=sha256_of(file))


def verify(directory: Path, entries: Iterable[FileEntry]) -> None:
    """Check that `directory` holds the files of `entries`, each of the right size and digest.

    Files that no entry names are not looked at.

    Raises:
        BackboneError: naming the first file that is missing or differs, with got and expected.
    """
    for entry in entries:
        verify_file(directory, entry)


def verify_file(directory: Path, entry: FileEntry) -> None:
    """Check that `directory` holds the file of `entry`, of the right size and digest.

    Raises:
        BackboneError: when it is missing or differs, with got and expected.
    """
    file = directory / entry.path
    try:
        size = file.stat().st_size
        digest = sha256_of(file) if size == entry.bytes else None
    except OSError as error:
        raise BackboneError(
            f"the backbone file {entry.path!r} cannot be read in {directory} "
            f"({error.strerror}): fetch the backbone again"
        ) from error
    if size != entry.bytes:
        raise BackboneError(
            f"the backbone file {entry.path!r} in {directory} has {size} bytes, "
            f"expected {entry.bytes}: fetch the backbone again"
        )
    if digest != entry.sha256:
        raise BackboneError(
            f"the backbone file {entry.path!r} in {directory} has SHA-256 {digest}, "
            f"expected {entry.sha256}: fetch the backbone again"
        )
