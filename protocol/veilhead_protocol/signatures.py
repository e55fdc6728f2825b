"""Signed manifests and model cards: a vendor's Ed25519 keys, and what they sign.

A signature is detached: the manifest's bytes and its digest are the same with and without. What is
signed is `veilhead-manifest-signature 1`, a newline, and the 32 bytes of the manifest's digest; the
manifest holds the model's name, so a signature is good for one version of one name. Of a model card
it is `veilhead-card-signature 1`, a newline, the digest of its version's manifest, and the SHA-256
of the card's Markdown: a card is good for one version, and neither signature can pass for the
other. Ed25519 is that of RFC 8032, by the package `cryptography`.

Written, a public key is `ed25519:` and the base64 of its 32 bytes. Several signatures, as after a
change of keys, stand in one header separated by commas, each `ed25519:<key id>:<base64>`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from veilhead_protocol.errors import SignatureError

#: The header of a manifest's or a card's answer that carries its signatures.
SIGNATURE_HEADER: Final = "X-Veilhead-Signature"

SCHEME: Final = "ed25519"
PUBLIC_KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
KEY_ID_BYTES: Final = 8

#: A version with more signatures is refused: each costs a client a verification.
MAX_SIGNATURES: Final = 8

#: A larger card is refused.
MAX_CARD_BYTES: Final = 512 * 2**10

_MANIFEST_DOMAIN: Final = b"veilhead-manifest-signature 1\n"
_CARD_DOMAIN: Final = b"veilhead-card-signature 1\n"


def signed_message(manifest_digest: bytes) -> bytes:
    """What a vendor signs of a manifest: the domain and its digest, 32 bytes."""
    return _MANIFEST_DOMAIN + _checked(manifest_digest)


def card_message(manifest_digest: bytes, card: bytes) -> bytes:
    """What a vendor signs of a card: the domain, its version's digest, and its own."""
    return _CARD_DOMAIN + _checked(manifest_digest) + hashlib.sha256(card).digest()


def _checked(manifest_digest: bytes) -> bytes:
    if len(manifest_digest) != hashlib.sha256().digest_size:
        raise SignatureError(f"got a digest of {len(manifest_digest)} bytes, expected 32")
    return manifest_digest


def _from_base64(text: str, size: int, what: str) -> bytes:
    try:
        value = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        value = b""
    # Only the canonical spelling: stray bits at the end would make two texts of one value.
    if len(value) != size or base64.b64encode(value).decode() != text:
        raise SignatureError(f"{what} is not the base64 of {size} bytes")
    return value


@dataclass(frozen=True)
class VendorKey:
    """A vendor's public key, by its 32 bytes."""

    data: bytes

    def __post_init__(self) -> None:
        if len(self.data) != PUBLIC_KEY_BYTES:
            raise SignatureError(f"got a vendor key of {len(self.data)} bytes, expected 32")

    @property
    def id(self) -> bytes:
        """The first eight bytes of the SHA-256 of the key: they find a signature, no more."""
        return hashlib.sha256(self.data).digest()[:KEY_ID_BYTES]

    def __str__(self) -> str:
        return f"{SCHEME}:{base64.b64encode(self.data).decode()}"

    @classmethod
    def parse(cls, text: str) -> VendorKey:
        """The key of `ed25519:<base64>`.

        Raises:
            SignatureError: when the text is not one.
        """
        scheme, _, encoded = text.strip().partition(":")
        if scheme != SCHEME:
            raise SignatureError(
                "a vendor key is written ed25519:<base64 of 32 bytes>, as "
                "`veilhead-server signing-key show` prints it"
            )
        return cls(_from_base64(encoded, PUBLIC_KEY_BYTES, "a vendor key"))


@dataclass(frozen=True)
class VendorSignature:
    """One signature, of a manifest or a card, and the id of the key that made it."""

    key_id: bytes
    data: bytes

    def __post_init__(self) -> None:
        if len(self.key_id) != KEY_ID_BYTES or len(self.data) != SIGNATURE_BYTES:
            raise SignatureError(
                f"got a key id of {len(self.key_id)} and a signature of {len(self.data)} bytes, "
                f"expected {KEY_ID_BYTES} and {SIGNATURE_BYTES}"
            )

    def __str__(self) -> str:
        return f"{SCHEME}:{self.key_id.hex()}:{base64.b64encode(self.data).decode()}"

    @classmethod
    def parse(cls, text: str) -> VendorSignature:
        """The signature of `ed25519:<key id>:<base64>`.

        Raises:
            SignatureError: when the text is not one.
        """
        scheme, _, rest = text.strip().partition(":")
        key_id, _, encoded = rest.partition(":")
        if (
            scheme != SCHEME
            or len(key_id) != 2 * KEY_ID_BYTES
            or set(key_id) - set("0123456789abcdef")
        ):
            raise SignatureError(
                "a signature is written ed25519:<16 hexadecimal digits>:<base64 of 64 bytes>"
            )
        return cls(bytes.fromhex(key_id), _from_base64(encoded, SIGNATURE_BYTES, "a signature"))

    def verifies(self, key: VendorKey, message: bytes) -> bool:
        """Whether `key` made this signature of a `signed_message` or a `card_message`."""
        try:
            Ed25519PublicKey.from_public_bytes(key.data).verify(self.data, message)
        except (InvalidSignature, ValueError):
            return False
        return True


def write_signatures(signatures: Iterable[VendorSignature]) -> str:
    """The header's value."""
    return ", ".join(map(str, signatures))


def read_signatures(text: str) -> tuple[VendorSignature, ...]:
    """The signatures of a header's value, at most `MAX_SIGNATURES`.

    Raises:
        SignatureError: when one is malformed, or there are too many.
    """
    parts = [part for part in text.split(",", MAX_SIGNATURES) if part.strip()]
    if len(parts) > MAX_SIGNATURES:
        raise SignatureError(f"expected at most {MAX_SIGNATURES} signatures")
    return tuple(map(VendorSignature.parse, parts))


def require_signature(
    manifest_digest: bytes, signatures: Sequence[VendorSignature], keys: Sequence[VendorKey]
) -> VendorKey:
    """The first of `keys` that signed the manifest with this digest.

    Raises:
        SignatureError: when none of them did.
    """
    return _signer("manifest", signed_message(manifest_digest), signatures, keys)


def require_card_signature(
    manifest_digest: bytes,
    card: bytes,
    signatures: Sequence[VendorSignature],
    keys: Sequence[VendorKey],
) -> VendorKey:
    """The first of `keys` that signed this card of the version with this digest.

    Raises:
        SignatureError: when none of them did.
    """
    return _signer("card", card_message(manifest_digest, card), signatures, keys)


def _signer(
    what: str, message: bytes, signatures: Sequence[VendorSignature], keys: Sequence[VendorKey]
) -> VendorKey:
    for key in keys:
        if any(item.key_id == key.id and item.verifies(key, message) for item in signatures):
            return key
    accepted = ", ".join(key.id.hex() for key in keys)
    if not signatures:
        raise SignatureError(
            f"the {what} is not signed, and this client accepts {what}s signed by the vendor "
            f"key {accepted} only: ask the vendor to publish with --sign-with"
        )
    found = ", ".join(item.key_id.hex() for item in signatures)
    raise SignatureError(
        f"the {what} has no valid signature by an accepted vendor key: got signatures that name "
        f"{found}, expected {accepted}; where the names are the same, the {what} is not the one "
        "that was signed"
    )
