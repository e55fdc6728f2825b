"""How versions get into a store: its format, whether its heads are encrypted, and their files.

    STORE/.format       the number of the store's format
    STORE/.encrypted    there once a head was published encrypted: from then on every one is

Everything here is called by one process at a time, which holds the store's lock.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

from veilhead_models.artifact import (
    BACKBONE_DIRECTORY,
    ENCRYPTED_HEAD_FILE,
    HEAD_FILE,
    HeadArtifact,
    read_manifest,
)
from veilhead_protocol.errors import ArtifactError, BackboneError, HeadKeyError, StoreError
from veilhead_protocol.files import verify
from veilhead_protocol.formats import format_complaint, format_line, read_format
from veilhead_protocol.manifest import NAME_PATTERN
from veilhead_service.head_encryption import HEADER_BYTES, HeadKey, key_id_of
from veilhead_service.store_files import sync_directory, write_atomically

#: Rises with every change of what a store holds and where. Format 1 had no file for it.
STORE_FORMAT: Final = "veilhead-store/2"

#: Hidden, as `.lock`: a model may have any name that begins with a letter or a digit.
FORMAT_FILE: Final = ".format"
ENCRYPTED_FILE: Final = ".encrypted"

_ENCRYPTED_TEXT: Final = b"Heads in this store are encrypted: it takes no plaintext one.\n"
_PUBLISH_AGAIN: Final = (
    "publish its models again with this version, into a new directory (a copy of a store must "
    f"have the hidden file {FORMAT_FILE})"
)

#: What a publisher that was killed leaves behind: directories half made or moved aside, and files
#: that `write_atomically` had not renamed yet.
_DIGEST: Final = "[0-9a-f]{64}"
_ASIDE: Final = re.compile(rf"\.old-({_DIGEST})")
_LEFT: Final = re.compile(
    rf"\.(veilhead-new-.*|(new|old)-{_DIGEST}"
    rf"|(current|{re.escape(FORMAT_FILE)}|{re.escape(ENCRYPTED_FILE)}|{re.escape(ENCRYPTED_HEAD_FILE)}"
    rf"|{_DIGEST}\.[a-z.]+)\.[a-z0-9_]{{8}})"
)


def check_store_format(store: Path) -> None:
    """Refuse a store of another format than this version reads.

    A directory in which nothing was published yet has none.

    Raises:
        StoreError: naming both formats, and what to do.
    """
    try:
        found = read_format(store / FORMAT_FILE)
        complaint = format_complaint(found, STORE_FORMAT, if_older=_PUBLISH_AGAIN)
        if complaint is not None and (found is not None or _holds_versions(store)):
            raise StoreError(f"the store {store} cannot be used: {complaint}")
    except OSError as error:
        raise StoreError(f"{error.filename} cannot be read: {error.strerror}") from error


def _holds_versions(store: Path) -> bool:
    return store.is_dir() and any(
        re.fullmatch(_DIGEST, path.name) or path.name == "current" for path in store.glob("*/*")
    )


def claim(store: Path) -> None:
    """Make a directory a store of this format, or see that it is one.

    Raises:
        StoreError: when it is one of another format.
        OSError: when it cannot be written.
    """
    check_store_format(store)
    if not (store / FORMAT_FILE).exists():
        write_atomically(store / FORMAT_FILE, format_line(STORE_FORMAT))


def takes_encrypted_heads_only(store: Path) -> bool:
    """Whether a head was ever published encrypted in this store, as far as it shows."""
    return (store / ENCRYPTED_FILE).exists() or any(store.glob(f"*/*/{ENCRYPTED_HEAD_FILE}"))


def settle(store: Path) -> None:
    """Remove what publishers that were killed left in a store.

    A damaged version that one of them had moved aside is put back: it says whether its head was
    encrypted.

    Raises:
        OSError: when that cannot be done.
    """
    homes = [path for path in store.iterdir() if NAME_PATTERN.fullmatch(path.name)]
    versions = [version for home in homes for version in home.glob("[0-9a-f]*")]
    for directory in (store, *homes, *versions):
        for path in list(directory.iterdir()) if directory.is_dir() else ():
            aside = _ASIDE.fullmatch(path.name)
            if aside is not None and not path.with_name(aside[1]).exists():
                path.rename(path.with_name(aside[1]))
            elif _LEFT.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def put_version(store: Path, artifact: HeadArtifact, head_key: HeadKey | None) -> Path:
    """Make the artefact's version what publishing it into an empty store would make; its directory.

    A version that is whole is not written again, but its head goes under `head_key`.

    Raises:
        StoreError: when that would put a plaintext head where encrypted ones are or were.
        OSError: when the store cannot be written.
    """
    home = store / artifact.manifest.name
    version = home / artifact.manifest.digest.hex()
    settle(store)
    if head_key is not None:
        # First: whatever becomes of this publisher, the next one knows.
        if not (store / ENCRYPTED_FILE).exists():
            write_atomically(store / ENCRYPTED_FILE, _ENCRYPTED_TEXT)
    elif takes_encrypted_heads_only(store) and not _is_whole_and_encrypted(version, artifact):
        raise StoreError(
            f"the store {store} holds encrypted heads, and this would put a plaintext one beside "
            "them: publish with the head key, --head-key-file, or into another store"
        )
    encrypt = None if head_key is None else head_key.encrypt
    if not version.exists():
        artifact.save(version, encrypt_head=encrypt)
    elif not _is_whole(version, artifact) or (head_key is None and not _has_head(version)):
        fresh, aside = (version.with_name(f".{what}-{version.name}") for what in ("new", "old"))
        artifact.save(fresh, encrypt_head=encrypt)
        version.rename(aside)
        fresh.rename(version)
        sync_directory(home)
        shutil.rmtree(aside)
    elif head_key is not None:
        content = head_key.encrypt(artifact.head_bytes(), artifact.manifest.digest)
        write_atomically(version / ENCRYPTED_HEAD_FILE, content, mode=0o600)
    if (version / ENCRYPTED_HEAD_FILE).exists():
        (version / HEAD_FILE).unlink(missing_ok=True)
        sync_directory(version)
    return version


def _is_whole(version: Path, artifact: HeadArtifact) -> bool:
    """Whether all of a version but its head is what the artefact says."""
    try:
        if read_manifest(version).digest != artifact.manifest.digest:
            return False
        if artifact.backbone is not None:
            verify(version / BACKBONE_DIRECTORY, artifact.backbone.all_files)
    except (ArtifactError, BackboneError):
        return False
    return True


def _has_head(version: Path) -> bool:
    """Whether a version's head can be read, as far as that shows without the head key."""
    encrypted = version / ENCRYPTED_HEAD_FILE
    try:
        if encrypted.exists():
            key_id_of(encrypted.read_bytes()[:HEADER_BYTES])
        else:
            HeadArtifact.load(version, verify_backbone=False)
    except (OSError, HeadKeyError, ArtifactError):
        return False
    return True


def _is_whole_and_encrypted(version: Path, artifact: HeadArtifact) -> bool:
    encrypted = (version / ENCRYPTED_HEAD_FILE).exists()
    return encrypted and _is_whole(version, artifact) and _has_head(version)
