"""Who may ask: bearer tokens, which the gateway keeps as hashes only."""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path
from typing import Final

from veilhead.api_key import read_private_file
from veilhead_protocol.errors import InputError

_MAX_FILE_BYTES: Final = 2**20

#: Long enough that nobody guesses it: 22 characters of base64 are 128 bits.
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]{22,512}=*")


class Callers:
    """Tokens of those who may ask."""

    def __init__(self, tokens: list[str]) -> None:
        """Raises InputError when there is none, or one of them is too short or malformed."""
        for number, token in enumerate(tokens, start=1):
            if not _TOKEN.fullmatch(token):
                raise InputError(
                    f"token {number} is not one: expected 22 to 512 letters, digits and "
                    "._~+/- ; `openssl rand -hex 24` makes one"
                )
        if not tokens:
            raise InputError("there is no token of a caller, expected one a line")
        self._digests = list(dict.fromkeys(_digest(token) for token in tokens))

    def __repr__(self) -> str:
        return f"Callers({len(self._digests)})"

    @classmethod
    def read(cls, path: Path) -> Callers:
        """The tokens of a file that only its owner can read: one a line, `#` begins a comment.

        Raises:
            InputError: when it cannot be read, others may read it, or it holds no tokens.
        """
        content = read_private_file(path, f"the file of callers {path}", _MAX_FILE_BYTES)
        lines = (line.strip() for line in content.decode("utf-8", "replace").splitlines())
        try:
            return cls([line for line in lines if line and not line.startswith("#")])
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, authorization: str) -> int | None:
        """The number of the caller that an Authorization header names, from 0; None for no caller.

        It takes a time that does not tell which one.
        """
        scheme, _, token = authorization.partition(" ")
        digest = _digest(token.strip())
        known = [hmac.compare_digest(digest, other) for other in self._digests]
        return known.index(True) if any(known) and scheme.lower() == "bearer" else None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()
