"""A client that pins its vendor's key believes that key and nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.heads import artifact, unit_rows
from support.services import ScriptedService, running
from support.stores import Vendor
from typer.testing import CliRunner

from veilhead import Client, ReplyError, SignatureError
from veilhead.cli import app
from veilhead.local import InProcessTransport
from veilhead_protocol.errors import ManifestError
from veilhead_protocol.policy import preset_policy
from veilhead_protocol.signatures import MAX_CARD_BYTES
from veilhead_service.app import create_app
from veilhead_service.model_store import ModelStore
from veilhead_service.settings import Settings
from veilhead_service.signing import SigningKey

KEY, OTHER = (SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in (1, 2))
FIRST, SECOND = (artifact(4, 32, seed=seed, name="model") for seed in (1, 2))
NEIGHBOUR = artifact(4, 32, seed=3, name="neighbour")


@pytest.fixture
def vendor(tmp_path):
    return Vendor(tmp_path)


class Substituting(ScriptedService):
    """A service that changes what it says about manifests before it is sent."""

    change = None

    async def handle_async_request(self, request):
        response = await super().handle_async_request(request)
        if self.change is not None and request.method == "GET":
            await response.aread()
            return self.change(response)
        return response


@pytest.fixture
def connect(vendor):
    clients = []

    def make(*, change=None, model="model", **options):
        service = Substituting(
            InProcessTransport(
                create_app(
                    Settings(workers=1, insecure_no_tenants=True), models=ModelStore(vendor.store)
                )
            )
        )
        service.change = change
        clients.append(Client("http://127.0.0.1", model, transport=service, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def public(key):
    return str(key.public)


def rewritten(body=None, signature=None):
    """A change of the manifest's bytes, its signature header, or both."""

    def change(response):
        headers = {k: v for k, v in response.headers.items() if k != "content-length"}
        if signature is not None:
            headers["x-veilhead-signature"] = signature
        if signature == "":
            del headers["x-veilhead-signature"]
        content = response.content if body is None else body
        return type(response)(response.status_code, headers=headers, content=content)

    return change


# --- what is accepted -----------------------------------------------------------------------------


def test_a_signed_model_answers(vendor, connect):
    vendor.publish(FIRST, signing_key=KEY)
    client = connect(vendor_key=public(KEY))
    row = unit_rows(1, 32)
    expected = FIRST.logits(row)
    assert np.abs(client.logits(row) - expected).max() <= client.manifest.head.error_bound


def test_during_a_change_of_keys_either_is_accepted(vendor, connect):
    vendor.publish(FIRST, signing_key=KEY)
    connect(vendor_key=[public(OTHER), public(KEY)])
    vendor.publish(FIRST, signing_key=OTHER)
    for accepted in (public(KEY), public(OTHER)):
        connect(vendor_key=accepted)


def test_without_a_vendor_key_nothing_of_signatures_is_read(vendor, connect):
    vendor.publish(FIRST)
    connect()
    connect(change=rewritten(signature="nonsense"))


# --- what is refused ------------------------------------------------------------------------------


def test_an_unsigned_manifest_is_refused(vendor, connect):
    vendor.publish(FIRST)
    with pytest.raises(SignatureError, match="not signed"):
        connect(vendor_key=public(KEY))


def test_leaving_the_signature_out_is_refused(vendor, connect):
    vendor.publish(FIRST, signing_key=KEY)
    with pytest.raises(SignatureError, match="not signed"):
        connect(vendor_key=public(KEY), change=rewritten(signature=""))


def test_another_vendors_signature_is_refused(vendor, connect):
    vendor.publish(FIRST, signing_key=OTHER)
    with pytest.raises(SignatureError, match=KEY.public.id.hex()):
        connect(vendor_key=public(KEY))


@pytest.mark.parametrize("signature", ["nonsense", "ed25519:" + "0" * 16 + ":AAAA", "," * 90])
def test_a_malformed_signature_is_refused(vendor, connect, signature):
    vendor.publish(FIRST, signing_key=KEY)
    with pytest.raises(SignatureError):
        connect(vendor_key=public(KEY), change=rewritten(signature=signature))


def test_other_bytes_under_a_signature_are_refused(vendor, connect):
    vendor.publish(FIRST, signing_key=KEY)
    other = SECOND.manifest.serialize()
    for body in (other, other + b" ", b"", b"{}"):
        with pytest.raises(SignatureError):
            connect(vendor_key=public(KEY), change=rewritten(body=body))


def test_the_signed_manifest_of_another_model_is_refused(vendor, connect):
    """Its signature is the vendor's own, but it is not what was asked for."""
    vendor.publish(FIRST, signing_key=KEY)
    signature = str(KEY.sign(NEIGHBOUR.manifest.digest))
    replayed = rewritten(body=NEIGHBOUR.manifest.serialize(), signature=signature)
    with pytest.raises(ManifestError, match="another model"):
        connect(vendor_key=public(KEY), change=replayed)


def test_the_signature_of_another_version_is_refused(vendor, connect):
    vendor.publish(FIRST, signing_key=KEY)
    signature = str(KEY.sign(SECOND.manifest.digest))
    with pytest.raises(SignatureError):
        connect(vendor_key=public(KEY), change=rewritten(signature=signature))


def test_an_older_signed_version_is_refused_by_its_digest_only(vendor, connect):
    """A signature says who made a version, not that it is the newest: docs say so."""
    vendor.publish(SECOND, signing_key=KEY)
    signature = str(KEY.sign(FIRST.manifest.digest))
    older = rewritten(body=FIRST.manifest.serialize(), signature=signature)
    connect(vendor_key=public(KEY), change=older)
    with pytest.raises(ManifestError, match="another version"):
        connect(vendor_key=public(KEY), change=older, digest=SECOND.manifest.digest.hex())


@pytest.mark.parametrize("given", ["", "ed25519:", "ed448:AAAA", [], ["ed25519:AAAA"]])
def test_what_is_no_vendor_key_is_refused_before_anything_is_asked(vendor, given):
    with pytest.raises(SignatureError):
        Client("http://127.0.0.1:1", "model", vendor_key=given)


# --- policies -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "instead", "clause"),
    [
        (b'"epsilon":4.0', b'"epsilon":4.5', "policy.privacy: the policy medical asks"),
        (b'"max_epsilon":4.0', b'"max_epsilon":40.0', "policy: .*privacy is weaker"),
        (b'"units":10000', b'"units":10001', "policy: .*query_budget is weaker"),
        (b'"bulk":false', b'"bulk":true', "policy: .*bulk is weaker"),
        (b'"deidentify":true', b'"deidentify":false', "policy: .*deidentify is weaker"),
        (
            b'"minimum_parameters":"standard"',
            b'"minimum_parameters":"compact"',
            "policy: .*is weaker",
        ),
    ],
)
def test_a_manifest_that_breaks_its_policy_is_refused_although_it_is_signed(
    vendor, connect, stated, instead, clause
):
    """No vendor key and no service makes a client take less than the policy says."""
    privacy = {"epsilon": 4.0, "delta": 1e-5}
    careful = replace(
        artifact(4, 32, name="model", parameters="standard"),
        policy=preset_policy("medical"),
        about={"privacy": privacy},
    )
    vendor.publish(careful, signing_key=KEY)
    connect(vendor_key=public(KEY), deidentify=False)
    honest = careful.manifest.serialize()
    assert honest.count(stated) == 1
    body = honest.replace(stated, instead)
    signature = str(KEY.sign(hashlib.sha256(body).digest()))
    with pytest.raises(ManifestError, match=clause):
        connect(vendor_key=public(KEY), change=rewritten(body=body, signature=signature))


# --- model cards ----------------------------------------------------------------------------------

CARD = "# Model card\n\naccuracy 0.8\n"


def card_changed(**changes):
    """A change of the card's answer alone: the manifest's stays as it is."""
    change = rewritten(**changes)
    return lambda response: (
        change(response)
        if response.headers["content-type"].startswith("text/markdown")
        else response
    )


def test_a_signed_card_is_the_vendors_word(vendor, connect):
    vendor.publish(FIRST, signing_key=KEY, card=CARD)
    assert connect(vendor_key=public(KEY)).card() == CARD
    assert connect(vendor_key=[public(OTHER), public(KEY)]).card() == CARD
    assert connect().card() == CARD


def test_a_tampered_card_is_refused(vendor, connect):
    vendor.publish(FIRST, signing_key=KEY, card=CARD)
    better = CARD.replace("0.8", "0.9").encode()
    for change in (
        card_changed(body=better),
        card_changed(body=CARD.encode() + b"\n"),
        card_changed(signature=""),
        card_changed(signature="nonsense"),
        card_changed(signature=str(OTHER.sign_card(FIRST.manifest.digest, better))),
        # The vendor's own signatures: of the manifest, and of this card for another version.
        card_changed(signature=str(KEY.sign(FIRST.manifest.digest))),
        card_changed(signature=str(KEY.sign_card(SECOND.manifest.digest, CARD.encode()))),
    ):
        client = connect(vendor_key=public(KEY), change=change)
        with pytest.raises(SignatureError):
            client.card()
    # It is the key that protects: without one, the service's word is all there is.
    assert connect(change=card_changed(body=better)).card() == better.decode()


def test_the_card_of_another_version_is_refused(vendor, connect):
    vendor.publish(FIRST, signing_key=KEY, card=CARD)
    vendor.publish(SECOND, signing_key=KEY, card=CARD.replace("0.8", "0.6"))
    older = str(KEY.sign_card(FIRST.manifest.digest, CARD.encode()))
    swapped = card_changed(body=CARD.encode(), signature=older)
    client = connect(vendor_key=public(KEY), change=swapped)
    with pytest.raises(SignatureError, match="the card has no valid signature"):
        client.card()


def test_a_card_that_the_vendor_did_not_sign_is_refused(vendor, connect):
    """The service's own, which it makes of the manifest, is such a one."""
    vendor.publish(FIRST, signing_key=KEY)
    with pytest.raises(SignatureError, match="the card is not signed"):
        connect(vendor_key=public(KEY)).card()
    vendor.publish(FIRST, card=CARD)
    with pytest.raises(SignatureError, match="the card is not signed"):
        connect(vendor_key=public(KEY)).card()


def test_a_card_that_is_not_text_is_an_error(vendor, connect):
    vendor.publish(FIRST, card=CARD)
    with pytest.raises(ReplyError, match="not UTF-8"):
        connect(change=card_changed(body=b"\xff")).card()
    with pytest.raises(ReplyError, match="longer"):
        connect(change=card_changed(body=b" " * (MAX_CARD_BYTES + 1))).card()


# --- the command ----------------------------------------------------------------------------------


def test_the_command_pins_keys(text_artifact, tmp_path):
    from veilhead_service.model_store import publish

    card = "# Card \x1b[31m\n"
    publish(text_artifact, tmp_path / "store", signing_key=KEY, card=card)
    (tmp_path / "keys").write_text(f"# of the vendor\n{public(OTHER)}\n\n{public(KEY)}\n")
    with running(tmp_path / "store", "--workers", "1") as url:

        def run(*arguments):
            at = ("--url", url, "--model", "colours", "mild fever")
            return CliRunner().invoke(app, ["classify", *at, *arguments])

        for accepted in (
            ["--vendor-key", public(KEY)],
            ["--vendor-key", public(OTHER), "--vendor-key", public(KEY)],
            ["--vendor-key", f"@{tmp_path / 'keys'}"],
        ):
            assert run(*accepted).exit_code == 0, accepted
        at = ["card", "--url", url, "--model", "colours", "--vendor-key"]
        shown = CliRunner().invoke(app, [*at, public(KEY)])
        assert (shown.exit_code, shown.stdout) == (0, "# Card ?[31m\n")
        assert CliRunner().invoke(app, [*at, public(OTHER)]).exit_code == 1
        (tmp_path / "empty").write_text("# nothing\n")
        for refused in (
            ["--vendor-key", public(OTHER)],
            ["--vendor-key", "nonsense"],
            ["--vendor-key", f"@{tmp_path / 'empty'}"],
            ["--vendor-key", f"@{tmp_path / 'absent'}"],
        ):
            result = run(*refused)
            assert result.exit_code == 1, refused
            assert result.stdout == ""
