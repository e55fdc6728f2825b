"""The public backbone on this machine: fetched from the service once, by digest.

Whole files lie in a directory that is named by their digests. A file that is on its way lies beside
that directory, survives whatever ends the process, and is continued by the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import anyio

from veilhead.transport import Transport
from veilhead_protocol.errors import BackboneError
from veilhead_protocol.files import cache_directory, sha256_of, verify_file
from veilhead_protocol.manifest import FileEntry, Manifest

_LOCK_PAUSE_SECONDS: Final = 0.1


async def fetch_backbone(
    transport: Transport,
    manifest: Manifest,
    files: Sequence[FileEntry],
    *,
    progress: Callable[[str, int], None] | None = None,
) -> Path:
    """A directory that holds these files of the manifest's backbone, each of its pinned digest.

    Args:
        transport: where missing files come from.
        manifest: the pinned manifest.
        files: those of its backbone that are needed here.
        progress: called with the path and size of each file before it is fetched.

    Raises:
        BackboneError: when the service sends other bytes than its manifest says, or the cache
            cannot be written.
    """
    name = _name(files)
    home = cache_directory() / "backbones"
    directory = home / name
    try:
        if not await _missing(directory, files):
            return directory
        directory.mkdir(parents=True, exist_ok=True)
        async with _alone_in(directory):
            unfinished = home / f".partial-{name}"
            for entry in await _missing(directory, files):  # somebody else may have been faster
                unfinished.mkdir(exist_ok=True)
                if progress is not None:
                    progress(entry.path, entry.bytes)
                await _fetch(transport, manifest, entry, unfinished / entry.sha256)
                target = directory / entry.path
                target.parent.mkdir(parents=True, exist_ok=True)
                (unfinished / entry.sha256).replace(target)
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise BackboneError(
            f"the backbone cannot be kept in {directory} ({error.strerror}): make room, or name "
            "another place with VEILHEAD_CACHE"
        ) from error
    return directory


async def _fetch(transport: Transport, manifest: Manifest, entry: FileEntry, target: Path) -> None:
    """Write a file of the pinned digest to `target`, going on where an earlier fetch ended."""
    while True:
        continued = target.exists()
        await transport.download(manifest.name, manifest.digest.hex(), entry, target)
        found = await anyio.to_thread.run_sync(sha256_of, target)
        if found == entry.sha256:
            return
        target.unlink()
        if not continued:  # or else the earlier part was to blame, perhaps
            raise BackboneError(
                f"the service sent a backbone file {entry.path!r} of SHA-256 {found}, its "
                f"manifest says {entry.sha256}: it was discarded; ask the vendor"
            )


def _name(files: Sequence[FileEntry]) -> str:
    """What names this very set of files: equal backbones of two models share a directory."""
    lines = sorted(f"{entry.sha256} {entry.path}\n" for entry in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


async def _missing(directory: Path, files: Sequence[FileEntry]) -> list[FileEntry]:
    """The files that are not in `directory`, or not as they should be."""

    def find() -> list[FileEntry]:
        return [entry for entry in files if not _is_there(directory, entry)]

    return await anyio.to_thread.run_sync(find)  # it reads them: other calls go on meanwhile


def _is_there(directory: Path, entry: FileEntry) -> bool:
    try:
        verify_file(directory, entry)
    except BackboneError:
        return False
    return True


@asynccontextmanager
async def _alone_in(directory: Path) -> AsyncIterator[None]:
    """While no other fetch, of this process or another, is in here.

    The lock ends with the process that holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await anyio.sleep(_LOCK_PAUSE_SECONDS)
            else:
                break
        yield
    finally:
        os.close(descriptor)
