"""Private heads at rest: AES-256-GCM under a key that is not in the store.

The file `head.safetensors.enc`, all of it:

    offset  bytes
    0       8      magic "VEILHEAD"
    8       1      version of the format, 1
    9       3      zero
    12      8      id of the key: SHA-256 of "veilhead-head-key 1\\n" and the key, its first bytes
    20      12     nonce, fresh random bytes for every file
    32      n      head.safetensors, encrypted
    32 + n  16     tag

Authenticated with it are "veilhead-encrypted-head 1\\n", the first 32 bytes of the file, and the
digest of the manifest beside it: the head of one version is refused beside the manifest of another.
The primitive is that of NIST SP 800-38D, by the package `cryptography`. Random nonces of 96 bits
are good for 2^32 files under one key (section 8.3 there).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from veilhead_protocol.errors import HeadKeyError, SecretFileError
from veilhead_protocol.formats import format_complaint
from veilhead_service.store_files import create_secret, read_secret

MAGIC: Final = b"VEILHEAD"
FORMAT_VERSION: Final = 1
KEY_BYTES: Final = 32
KEY_ID_BYTES: Final = 8
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
HEADER_BYTES: Final = 32

_FORMAT_NAME: Final = "veilhead-encrypted-head"
_SCHEME: Final = "aes256gcm"
_PREFIX: Final = MAGIC + bytes([FORMAT_VERSION, 0, 0, 0])
_KEY_ID_DOMAIN: Final = b"veilhead-head-key 1\n"
_DOMAIN: Final = b"veilhead-encrypted-head 1\n"
_MAX_KEY_FILE_BYTES: Final = 256


@dataclass(frozen=True, repr=False, eq=False)
class HeadKey:
    """The key of a store's heads: 32 random bytes."""

    data: bytes

    def __post_init__(self) -> None:
        if len(self.data) != KEY_BYTES:
            raise SecretFileError(f"got a head key of {len(self.data)} bytes, expected {KEY_BYTES}")

    def __repr__(self) -> str:
        return f"HeadKey({self.id.hex()})"

    def __reduce__(self) -> Any:
        raise TypeError("a head key cannot be pickled or copied")

    @property
    def id(self) -> bytes:
        """Eight bytes that tell keys apart. The key is random: its hash tells nothing of it."""
        return hashlib.sha256(_KEY_ID_DOMAIN + self.data).digest()[:KEY_ID_BYTES]

    @classmethod
    def create(cls, path: Path) -> HeadKey:
        """A new key, kept in a new file that only this user can read.

        Raises:
            SecretFileError: when the file exists or cannot be written.
        """
        key = cls(secrets.token_bytes(KEY_BYTES))
        create_secret(path, f"{_SCHEME}:{base64.b64encode(key.data).decode()}\n".encode())
        return key

    @classmethod
    def load(cls, path: Path) -> HeadKey:
        """The key of a file.

        Raises:
            SecretFileError: when the file cannot be read or does not hold one.
        """
        content = read_secret(path, max_bytes=_MAX_KEY_FILE_BYTES)
        return cls.parse(content.decode("ascii", "replace"), str(path))

    @classmethod
    def parse(cls, text: str, origin: str) -> HeadKey:
        """The key of `aes256gcm:<base64>`; `origin` says in an error where the text was.

        Raises:
            SecretFileError: when the text is not one.
        """
        scheme, _, encoded = text.strip().partition(":")
        try:
            data = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            data = b""
        if scheme != _SCHEME or len(data) != KEY_BYTES:
            raise SecretFileError(
                f"{origin} does not hold a head key ({_SCHEME}:<base64 of {KEY_BYTES} bytes>): "
                "make one with `veilhead-server head-key new FILE`"
            )
        return cls(data)

    def encrypt(self, head: bytes, manifest_digest: bytes) -> bytes:
        """The file of a head, bound to the manifest with this digest."""
        header = _PREFIX + self.id + secrets.token_bytes(NONCE_BYTES)
        associated = _DOMAIN + header + manifest_digest
        return header + AESGCM(self.data).encrypt(header[-NONCE_BYTES:], head, associated)

    def decrypt(self, content: bytes, manifest_digest: bytes) -> bytes:
        """The head of a file's content, which must be the one of this manifest.

        Raises:
            HeadKeyError: when it is under another key, of another version, or was altered.
        """
        found = key_id_of(content)
        if found != self.id:
            raise HeadKeyError(
                f"the head is encrypted under the key {found.hex()}, got the key {self.id.hex()}: "
                "give the service the right key, or publish the artefact again"
            )
        header = content[:HEADER_BYTES]
        associated = _DOMAIN + header + manifest_digest
        try:
            return AESGCM(self.data).decrypt(
                header[-NONCE_BYTES:], content[HEADER_BYTES:], associated
            )
        except InvalidTag:
            raise HeadKeyError(
                "the encrypted head was altered or belongs to another version: "
                "publish the artefact again"
            ) from None


def key_id_of(content: bytes) -> bytes:
    """The id of the key that a file's content, or its first 32 bytes, says it is under.

    Raises:
        HeadKeyError: when it is not an encrypted head.
    """
    if len(content) < HEADER_BYTES or not content.startswith(MAGIC):
        raise HeadKeyError("this is not an encrypted head: publish the artefact again")
    if not content.startswith(_PREFIX):
        complaint = format_complaint(
            f"{_FORMAT_NAME}/{content[len(MAGIC)]}",
            f"{_FORMAT_NAME}/{FORMAT_VERSION}",
            if_older="publish the artefact again",
        )
        raise HeadKeyError(
            f"this encrypted head cannot be read: {complaint or 'publish the artefact again'}"
        )
    return content[len(_PREFIX) : len(_PREFIX) + KEY_ID_BYTES]


def find_head_key(file: Path | None, text: str | None) -> HeadKey | None:
    """The head key that an operator gave, as a file or as text, or None.

    Raises:
        SecretFileError: when both are given, or what is given is not a key.
    """
    if file is not None and text is not None:
        raise SecretFileError("give the head key as a file or in the environment, not both")
    if file is not None:
        return HeadKey.load(file)
    return None if text is None else HeadKey.parse(text, "the environment")
