"""The vendor's signing key: Ed25519, in a file of its own that the running service never needs.

`veilhead_protocol.signatures` says what is signed and how it is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from veilhead_protocol.errors import SecretFileError
from veilhead_protocol.signatures import VendorKey, VendorSignature, card_message, signed_message
from veilhead_service.store_files import create_secret, read_secret

_MAX_PEM_BYTES = 4096


class SigningKey:
    """A vendor's private key. Only `public` and signatures ever leave it."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = VendorKey(private.public_key().public_bytes_raw())

    def __repr__(self) -> str:
        return f"SigningKey({self.public.id.hex()})"

    def __reduce__(self) -> Any:
        raise TypeError("a signing key cannot be pickled or copied")

    @classmethod
    def create(cls, path: Path) -> SigningKey:
        """A new key, kept in a new file: PEM of PKCS #8, readable by this user only.

        Raises:
            SecretFileError: when the file exists or cannot be written.
        """
        private = Ed25519PrivateKey.generate()
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        create_secret(path, pem)
        return cls(private)

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """The key of a file.

        Raises:
            SecretFileError: when it is not an unencrypted Ed25519 key in PEM.
        """
        pem = read_secret(path, max_bytes=_MAX_PEM_BYTES)
        try:
            private = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            private = None
        if not isinstance(private, Ed25519PrivateKey):
            # Not what the parser says: it may quote the file.
            raise SecretFileError(
                f"{path} is not an Ed25519 private key (PEM of PKCS #8, without a password): "
                "make one with `veilhead-server signing-key new FILE`"
            )
        return cls(private)

    def sign(self, manifest_digest: bytes) -> VendorSignature:
        """The signature of the manifest with this digest."""
        return self._sign(signed_message(manifest_digest))

    def sign_card(self, manifest_digest: bytes, card: bytes) -> VendorSignature:
        """The signature of a card, of the version whose manifest has this digest."""
        return self._sign(card_message(manifest_digest, card))

    def _sign(self, message: bytes) -> VendorSignature:
        return VendorSignature(self.public.id, self._private.sign(message))
