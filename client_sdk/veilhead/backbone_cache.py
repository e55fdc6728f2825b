"""The public backbone on this machine: fetched from the service once, by digest."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

from veilhead.transport import Transport
from veilhead_protocol.errors import BackboneError
from veilhead_protocol.manifest import BackboneSection, FileEntry, Manifest


def cache_directory() -> Path:
    """Where files are kept: $VEILHEAD_CACHE, or the user's cache directory."""
    chosen = os.environ.get("VEILHEAD_CACHE")
    return Path(chosen) if chosen else platformdirs.user_cache_path("veilhead")


def _directory(root: Path, backbone: BackboneSection) -> Path:
    """The directory of this very set of files: equal backbones of two models share it."""
    lines = sorted(f"{entry.sha256} {entry.path}\n" for entry in backbone.files)
    return root / "backbones" / hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_there(path: Path, entry: FileEntry) -> bool:
    if not path.is_file() or path.stat().st_size != entry.bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256


async def fetch_backbone(
    transport: Transport,
    manifest: Manifest,
    root: Path,
    *,
    progress: Callable[[str, int], None] | None = None,
) -> Path:
    """A directory that holds the manifest's backbone, every file of the pinned digest.

    Args:
        transport: where missing files come from.
        manifest: the pinned manifest; it must have a backbone.
        root: the cache.
        progress: called with the path and size of each file before it is fetched.

    Raises:
        BackboneError: when the service sends other bytes than its manifest says.
    """
    if manifest.backbone is None:
        raise AssertionError("the caller asks only for backbones that exist")
    directory = _directory(root, manifest.backbone)
    for entry in manifest.backbone.files:
        target = directory / entry.path
        if _is_there(target, entry):
            continue
        if progress is not None:
            progress(entry.path, entry.bytes)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".partial-", dir=target.parent)
        os.close(descriptor)
        partial = Path(name)
        try:
            await transport.download(
                manifest.name, manifest.digest.hex(), entry.path, entry.bytes, partial
            )
            if not _is_there(partial, entry):
                raise BackboneError(
                    f"the service sent other bytes for {entry.path!r} than its manifest says; "
                    "nothing was kept"
                )
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return directory
