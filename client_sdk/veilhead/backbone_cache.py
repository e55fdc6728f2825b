"""The public backbone on this machine: fetched from the service once, by digest."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from veilhead.transport import Transport
from veilhead_protocol.errors import BackboneError
from veilhead_protocol.files import cache_directory, verify_file
from veilhead_protocol.manifest import BackboneSection, FileEntry, Manifest


def _directory(backbone: BackboneSection) -> Path:
    """The directory of this very set of files: equal backbones of two models share it."""
    lines = sorted(f"{entry.sha256} {entry.path}\n" for entry in backbone.files)
    return cache_directory() / "backbones" / hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_there(directory: Path, entry: FileEntry) -> bool:
    try:
        verify_file(directory, entry)
    except BackboneError:
        return False
    return True


async def fetch_backbone(
    transport: Transport,
    manifest: Manifest,
    *,
    progress: Callable[[str, int], None] | None = None,
) -> Path:
    """A directory that holds the manifest's backbone, every file of the pinned digest.

    Args:
        transport: where missing files come from.
        manifest: the pinned manifest; it must have a backbone.
        progress: called with the path and size of each file before it is fetched.

    Raises:
        BackboneError: when the service sends other bytes than its manifest says.
    """
    if manifest.backbone is None:
        raise AssertionError("the caller asks only for backbones that exist")
    directory = _directory(manifest.backbone)
    missing = [entry for entry in manifest.backbone.files if not _is_there(directory, entry)]
    if not missing:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that a whole file is renamed into place, and nothing else ever is.
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory.parent))
    try:
        for entry in missing:
            if progress is not None:
                progress(entry.path, entry.bytes)
            for place in (partial, directory):
                (place / entry.path).parent.mkdir(parents=True, exist_ok=True)
            await transport.download(
                manifest.name,
                manifest.digest.hex(),
                entry.path,
                entry.bytes,
                partial / entry.path,
            )
            verify_file(partial, entry)
            (partial / entry.path).replace(directory / entry.path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory
