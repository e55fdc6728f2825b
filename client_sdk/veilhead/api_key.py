"""The API key that a vendor gave: where it comes from. No message here ever holds it."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Final

from veilhead_protocol.errors import InputError

#: The variable that is read when no key is given.
API_KEY_VARIABLE: Final = "VEILHEAD_API_KEY"

#: The characters of a bearer token (RFC 6750, section 2.1): nothing else fits into the header.
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]{1,512}=*")


def find_api_key(given: str | None) -> str | None:
    """The key that was given, else the environment's, else None.

    Raises:
        InputError: when it is not a key.
    """
    if given is not None:
        return _checked(given, "api_key")
    found = os.environ.get(API_KEY_VARIABLE, "")
    return _checked(found, API_KEY_VARIABLE) if found else None


def read_api_key_file(path: Path) -> str:
    """The key in a file that only its owner can read; white space around it is ignored.

    Raises:
        InputError: when the file cannot be read, others may read it, or it holds no key.
    """
    where = f"the API key file {path}"
    content = read_private_file(path, where, 4096)
    return _checked(content.decode("ascii", "replace").strip(), where)


def read_private_file(path: Path, where: str, limit: int) -> bytes:
    """At most `limit` bytes of a file that only its owner can read; `where` is its name in errors.

    Raises:
        InputError: when the file cannot be read, or others may read it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise InputError(
                    f"{where} is open to other users of this machine "
                    f"(mode {stat.S_IMODE(mode):03o}): chmod 600 it, and have the key rotated if "
                    "they may have read it"
                )
            return file.read(limit)
    except OSError as error:
        raise InputError(f"{where} cannot be read ({error.strerror})") from error


def _checked(text: str, where: str) -> str:
    if not _TOKEN.fullmatch(text):
        raise InputError(
            f"{where} does not hold an API key: expected one line of the form vh_..., as "
            "`veilhead-server tenants add` printed it"
        )
    return text
