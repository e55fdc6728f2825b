"""Public files by content: their entries in a manifest, and the check that they are what it says.

Needs neither torch nor safetensors: clients and services use it as well.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from veilhead_protocol.errors import BackboneError
from veilhead_protocol.manifest import BackboneSection, FileEntry


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


def verify_files(directory: Path, section: BackboneSection) -> None:
    """Check that `directory` holds every file of `section`, of the right size and digest.

    Files that the section does not name are not looked at.

    Raises:
        BackboneError: naming the first file that is missing or differs, with got and expected.
    """
    for entry in section.files:
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
