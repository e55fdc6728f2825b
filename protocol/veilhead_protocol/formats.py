"""The number of a format, by which software refuses what it would misread.

A directory of ours holds its format in a small file: a name, a slash, a number, a newline. The
number rises when anything that a reader relies on changes.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

_FORMAT = re.compile(r"([a-z][a-z0-9-]{0,31})/([1-9][0-9]{0,5})")
_MAX_BYTES = 64


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


def format_line(name: str) -> bytes:
    """The content of a file that holds this format."""
    return f"{name}\n".encode("ascii")


def read_format(file: Path) -> str | None:
    """The format that a file holds, as it stands there, or None when there is no such file.

    Raises:
        OSError: when it cannot be read.
    """
    try:
        return read_regular(file)[:_MAX_BYTES].decode("ascii", "replace").strip()
    except FileNotFoundError:
        return None


def format_complaint(found: str | None, expected: str, *, if_older: str) -> str | None:
    """What to say of a format that is not the expected one, or None when it is.

    Args:
        found: what was read; None stands for format 1, of before there were numbers.
        expected: the one that this software reads.
        if_older: what to do with something older.
    """
    if found == expected:
        return None
    name, _, number = expected.partition("/")
    if found is None:
        found = f"{name}/1"
    match = _FORMAT.fullmatch(found)
    if match is None or match[1] != name:
        return f"it says that its format is {found[:40]!r}, expected {expected}: {if_older}"
    if int(match[2]) > int(number):
        return f"its format is {found}, this version of Veilhead reads {expected}: upgrade Veilhead"
    return f"its format is {found}, this version of Veilhead reads {expected}: {if_older}"
