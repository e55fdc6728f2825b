"""Signing keys, and signatures of manifests as the service hands them out."""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import pickle
import stat
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from support.heads import artifact

from veilhead_protocol.errors import SecretFileError, SignatureError, StoreError
from veilhead_protocol.signatures import (
    MAX_SIGNATURES,
    VendorKey,
    VendorSignature,
    card_message,
    read_signatures,
    require_card_signature,
    require_signature,
    signed_message,
    write_signatures,
)
from veilhead_service.app import create_app
from veilhead_service.model_store import ModelStore, retire
from veilhead_service.retirement import Retirement
from veilhead_service.settings import Settings
from veilhead_service.signing import SigningKey

#: The seed and the public key of RFC 8032, section 7.1, test 1.
RFC_SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
RFC_PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")

DIGEST = bytes(range(32))


def signing_key(seed=RFC_SEED):
    return SigningKey(Ed25519PrivateKey.from_private_bytes(seed))


KEY = signing_key()
OTHER = signing_key(bytes(32))


# --- what is signed -------------------------------------------------------------------------------


def test_the_message_is_separated_from_every_other_use_of_the_key():
    assert signed_message(DIGEST) == b"veilhead-manifest-signature 1\n" + DIGEST
    with pytest.raises(SignatureError):
        signed_message(DIGEST[:-1])
    raw = VendorSignature(KEY.public.id, KEY._private.sign(DIGEST))
    assert not raw.verifies(KEY.public, signed_message(DIGEST))
    card = KEY.sign_card(DIGEST, b"# Card\n")
    assert card.verifies(KEY.public, card_message(DIGEST, b"# Card\n"))
    # Neither of the two can stand for the other, whatever the card is.
    assert not card.verifies(KEY.public, signed_message(DIGEST))
    assert not KEY.sign(DIGEST).verifies(KEY.public, card_message(DIGEST, b""))


def test_golden_signature():
    """Ed25519 is deterministic: another byte is another format."""
    assert KEY.public.data == RFC_PUBLIC
    assert KEY.public.id == hashlib.sha256(RFC_PUBLIC).digest()[:8]
    assert str(KEY.public) == "ed25519:" + base64.b64encode(RFC_PUBLIC).decode()
    assert str(KEY.sign(DIGEST)) == (
        "ed25519:21fe31dfa154a261:hrQ7o3p6lDvv84dAPugmnLoSVbXaWvfep2v"
        "nHBfqQRLxpsfihyu+vf5Szdf4xP5hWTUiDKB/Z0hddl/aIRekBA=="
    )


def test_texts_are_read_back():
    assert VendorKey.parse(f" {KEY.public}\n") == KEY.public
    both = (KEY.sign(DIGEST), OTHER.sign(DIGEST))
    assert read_signatures(write_signatures(both)) == both
    assert read_signatures("") == ()


@given(st.integers(0, 8 * 64 - 1))
def test_every_flipped_bit_is_noticed(place):
    signature = bytearray(KEY.sign(DIGEST).data)
    signature[place // 8] ^= 1 << place % 8
    changed = VendorSignature(KEY.public.id, bytes(signature))
    with pytest.raises(SignatureError):
        require_signature(DIGEST, [changed], [KEY.public])


def test_only_the_signed_digest_and_an_accepted_key_will_do():
    mine = KEY.sign(DIGEST)
    assert require_signature(DIGEST, [OTHER.sign(DIGEST), mine], [KEY.public]) == KEY.public
    assert require_signature(DIGEST, [mine], [OTHER.public, KEY.public]) == KEY.public
    relabelled = VendorSignature(KEY.public.id, OTHER.sign(DIGEST).data)
    for signatures, keys, digest in (
        ([], [KEY.public], DIGEST),
        ([mine], [OTHER.public], DIGEST),
        ([mine], [KEY.public], bytes(32)),
        ([relabelled], [KEY.public], DIGEST),
        ([mine], [], DIGEST),
    ):
        with pytest.raises(SignatureError):
            require_signature(digest, signatures, keys)


def test_a_signed_card_is_that_card_of_that_version():
    card = b"# Card\n"
    assert card_message(DIGEST, card) == (
        b"veilhead-card-signature 1\n" + DIGEST + hashlib.sha256(card).digest()
    )
    signature = KEY.sign_card(DIGEST, card)
    assert require_card_signature(DIGEST, card, [signature], [KEY.public]) == KEY.public
    for digest, content, found, key in (
        (DIGEST, b"# Cord\n", [signature], KEY),
        (DIGEST, card + b"\n", [signature], KEY),
        (bytes(32), card, [signature], KEY),
        (DIGEST, card, [KEY.sign(DIGEST)], KEY),
        (DIGEST, card, [signature], OTHER),
        (DIGEST, card, [], KEY),
    ):
        with pytest.raises(SignatureError, match="the card"):
            require_card_signature(digest, content, found, [key.public])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ed25519",
        "ed25519:",
        "ed448:" + base64.b64encode(RFC_PUBLIC).decode(),
        "ed25519:" + base64.b64encode(RFC_PUBLIC[:-1]).decode(),
        "ed25519:" + base64.b64encode(RFC_PUBLIC).decode().rstrip("="),
        "ed25519:" + base64.b64encode(RFC_PUBLIC).decode() + "\nx",
        "ed25519:" + RFC_PUBLIC.hex(),
        "ed25519:é",
    ],
)
def test_what_is_no_vendor_key_is_refused(text):
    with pytest.raises(SignatureError):
        VendorKey.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "ed25519",
        "ed25519:0011223344556677",
        "ed25519:0011223344556677:AAAA",
        "ed25519:00112233445566XX:" + "A" * 86 + "==",
        "ed25519:0011223344556677:" + "A" * 85 + "B==",  # stray bits
        "ed25518:0011223344556677:" + "A" * 86 + "==",
    ],
)
def test_what_is_no_signature_is_refused(text):
    with pytest.raises(SignatureError):
        read_signatures(text)


@given(st.text(max_size=200) | st.text("ed25519:,=A0/ ", max_size=200))
def test_any_text_is_signatures_or_one_error(text):
    with contextlib.suppress(SignatureError):
        assert read_signatures(text) == ()


def test_too_many_signatures_are_refused_before_one_is_checked():
    one = str(KEY.sign(DIGEST))
    assert len(read_signatures(", ".join([one] * MAX_SIGNATURES))) == MAX_SIGNATURES
    with pytest.raises(SignatureError, match="at most 8"):
        read_signatures(", ".join([one] * (MAX_SIGNATURES + 1)))


# --- signing keys ---------------------------------------------------------------------------------


def test_a_new_key_is_private_and_never_replaces_another(tmp_path):
    path = tmp_path / "vendor.pem"
    key = SigningKey.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().startswith("-----BEGIN PRIVATE KEY-----\n")
    assert SigningKey.load(path).public == key.public
    with pytest.raises(SecretFileError, match="exists"):
        SigningKey.create(path)
    assert SigningKey.load(path).public == key.public


def pem(key, encryption=None):
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a key",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        pem(Ed448PrivateKey.generate()),
        pem(Ed25519PrivateKey.generate(), BestAvailableEncryption(b"password")),
        b"x" * 5000,
    ],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "vendor.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(SecretFileError, match="not a"):
        SigningKey.load(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o644])
def test_a_key_that_others_may_read_is_refused(tmp_path, mode):
    path = tmp_path / "vendor.pem"
    SigningKey.create(path)
    path.chmod(mode)
    with pytest.raises(SecretFileError, match=f"mode {mode:03o}.*chmod 600"):
        SigningKey.load(path)
    path.chmod(0o400)
    assert SigningKey.load(path)


def test_a_key_shows_and_copies_itself_nowhere():
    assert repr(KEY) == f"SigningKey({KEY.public.id.hex()})"
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            copied(KEY)


# --- in a store and over HTTP ---------------------------------------------------------------------


@pytest.fixture
def client(vendor):
    return TestClient(create_app(Settings(store=vendor.store, workers=1, insecure_no_tenants=True)))


def test_a_signature_comes_with_the_manifest(vendor, client):
    digest = vendor.publish(artifact(4, 32, name="model"), signing_key=KEY)
    for path in ("/v1/models/model", f"/v1/models/model?digest={digest}"):
        answer = client.get(path)
        (signature,) = read_signatures(answer.headers["x-veilhead-signature"])
        found = hashlib.sha256(answer.content).digest()
        assert signature.verifies(KEY.public, signed_message(found))
        known = client.get(path, headers={"If-None-Match": f'"{digest}"'})
        assert known.status_code == 304
        assert known.headers["x-veilhead-signature"] == answer.headers["x-veilhead-signature"]


def test_signing_later_changes_neither_digest_nor_version(vendor, client):
    head = artifact(4, 32, name="model")
    digest = vendor.publish(head)
    version = vendor.version("model", digest)
    files = {path: path.read_bytes() for path in version.rglob("*") if path.is_file()}
    before = client.get("/v1/models/model")
    assert "x-veilhead-signature" not in before.headers
    for key in (KEY, OTHER, KEY):  # the third takes the place of the first
        assert vendor.publish(head, signing_key=key) == digest
    after = client.get("/v1/models/model")
    assert after.content == before.content
    found = read_signatures(after.headers["x-veilhead-signature"])
    assert {item.key_id for item in found} == {KEY.public.id, OTHER.public.id}
    assert {path: path.read_bytes() for path in version.rglob("*") if path.is_file()} == files


def test_a_cache_that_asks_again_learns_of_new_signatures_and_of_the_end(vendor, client):
    """The bytes stay, so the answer is 304; the headers it carries are those of now."""
    head = artifact(4, 32, name="model")
    digest = vendor.publish(head)
    path = f"/v1/models/model?digest={digest}"
    first = client.get(path)
    assert first.headers["cache-control"] == "no-cache"  # so that a cache does ask again
    held = {"If-None-Match": first.headers["etag"]}
    vendor.publish(head, signing_key=KEY)
    retire(vendor.store, "model", digest, Retirement(datetime(2099, 1, 1, tzinfo=UTC)))
    again = client.get(path, headers=held)
    assert (again.status_code, again.content) == (304, b"")
    (signature,) = read_signatures(again.headers["x-veilhead-signature"])
    assert signature.verifies(KEY.public, signed_message(bytes.fromhex(digest)))
    assert again.headers["sunset"] == "Thu, 01 Jan 2099 00:00:00 GMT"
    retire(vendor.store, "model", digest, Retirement(datetime(2020, 1, 1, tzinfo=UTC)))
    assert client.get(path, headers=held).status_code == 410


def test_a_version_has_a_bounded_number_of_signatures(vendor):
    head = artifact(4, 32, name="model")
    for number in range(MAX_SIGNATURES):
        vendor.publish(head, signing_key=signing_key(bytes([number + 1]) * 32))
    with pytest.raises(StoreError, match="at most 8"):
        vendor.publish(head, signing_key=KEY)
    assert len(ModelStore(vendor.store).current("model").signatures) == MAX_SIGNATURES


@pytest.mark.parametrize("content", [b"x", b"\xff\n", b"ed25519:00:AA\r\nX-Evil: 1\n"])
def test_a_damaged_signature_file_is_never_sent(vendor, client, problem, content):
    digest = vendor.publish(artifact(4, 32, name="model"), signing_key=KEY)
    vendor.version("model", f"{digest}.signatures").write_bytes(content)
    problem(client.get("/v1/models/model"), 503, "model-unavailable", retryable=True)
