"""Small files, written whole or not at all: records of the store, and new secrets."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

from veilhead_protocol.errors import SecretFileError


def write_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Put `content` in the place of `path`: a reader sees the old content or the new one.

    Raises:
        OSError: when it cannot be written.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Let renames in this directory survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_regular(path: Path) -> bytes:
    """The content of a file; of anything else it is not waited for, as a pipe would have it.

    Raises:
        OSError: when it cannot be read, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def create_secret(path: Path, content: bytes) -> None:
    """Write a new file that only this user can read; never in the place of another.

    Raises:
        SecretFileError: when something is there already, or it cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise SecretFileError(
            f"{path} exists and may hold a key that is in use: choose another name"
        ) from error
    except OSError as error:
        raise SecretFileError(f"{path} cannot be written ({error.strerror})") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


def read_secret(path: Path, *, max_bytes: int) -> bytes:
    """The content of a file that holds a key.

    Raises:
        SecretFileError: when it cannot be read, others may read or write it, or it is longer than
            any key.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise SecretFileError(
                    f"{path} is open to other users of this machine (mode {mode:03o}): chmod 600 "
                    "it, and make a new key if they may have read this one"
                )
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise SecretFileError(f"{path} cannot be read ({error.strerror})") from error
    if len(content) > max_bytes:
        raise SecretFileError(f"{path} has more than {max_bytes} bytes: it is not a key")
    return content
