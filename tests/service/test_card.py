"""Model cards: what they say, what they never say, and how they are served."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.testclient import TestClient
from support.heads import artifact
from typer.testing import CliRunner

from veilhead_protocol.errors import ArtifactError, StoreError
from veilhead_protocol.policy import preset_policy
from veilhead_protocol.signatures import (
    VendorSignature,
    read_signatures,
    require_card_signature,
)
from veilhead_service.app import create_app
from veilhead_service.card import CardSources, to_html, to_markdown
from veilhead_service.cli import app
from veilhead_service.model_store import publish
from veilhead_service.settings import Settings
from veilhead_service.signing import SigningKey

KEY, OTHER = (SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in (1, 2))

HOSTILE = "a | b <script>alert(1)</script> [x](javascript:1) `c`"

PRIVACY = {
    "epsilon": 4.0,
    "delta": 1e-5,
    "adjacency": "add-remove",
    "unit": "one row of the training split",
    "mechanism": "noise",
    "accountants": {"one": 3.9999, "two": 4.0},
    "not_covered": ["the public backbone"],
}


def report(labels, *, f1=0.75):
    return {
        "test_rows": 12,
        "accuracy": 0.8125,
        "macro_f1": f1,
        "negative_log_likelihood": 0.5,
        "brier": 0.25,
        "calibration_error": 0.0625,
        "reliability": [
            {"lower": 0.5, "upper": 1.0, "rows": 12, "confidence": 0.7, "accuracy": 0.6}
        ],
        "classes": [
            {"label": label, "precision": 0.5, "recall": 0.25, "f1": f1 - index / 10, "support": 4}
            for index, label in enumerate(labels)
        ],
    }


def head(**changes):
    made = artifact(3, 32, name="model")
    return replace(made, **changes)


def test_a_card_says_what_its_sources_say() -> None:
    made = head(policy=preset_policy("medical"), about={"privacy": PRIVACY})
    labels = made.labels
    without = report(labels, f1=0.9)
    without["classes"].reverse()  # found by label, not by place
    figure = {
        "attack": "dp-audit",
        "system": "veilhead",
        "target": "epsilon 4",
        "metric": "lower bound",
        "value": 1.25,
        "expected": "at most 4",
        "holds": True,
    }
    text = to_markdown(
        CardSources(made.manifest, report(labels), without, [figure, figure | {"holds": False}])
    )
    for said in (
        made.manifest.digest.hex(),
        "0.812",
        "F1 lost",
        "epsilon by two | 4.0000",
        "lower bound | 1.25",
        "**broken**",
        "2^273.9",
        "lattice-estimator 27a581b",
        "query\\_budget | units 10,000, period day | enforced by the service",
        "deidentify | yes | promised by the client",
        "was not measured",
        "not signed",
        "embeddings of 32 values",
    ):
        assert said in text, said
    # Whoever pays most comes first.
    rows = [line for line in text.splitlines() if line.startswith("| label ")]
    lost = [float(line.split("|")[6]) for line in rows]
    assert lost == sorted(lost, reverse=True)


def test_a_card_of_the_manifest_alone_says_what_is_missing() -> None:
    text = to_markdown(CardSources(head().manifest))
    for said in ("does not publish scores", "does not say what", "None. What the head tells"):
        assert said in text


def test_a_card_holds_the_ends_of_curves_and_all_that_is_broken() -> None:
    def point(at, holds=True):
        return {
            "attack": "extraction", "system": "veilhead", "target": f"texts, {at} queries",
            "metric": "error", "value": 0.5, "expected": "above 0.1", "holds": holds,
            "curve": "texts", "at": at,
        }  # fmt: skip

    points = [point(10), point(50, holds=False), point(200), point(400)]
    text = to_markdown(CardSources(head().manifest, attacks=points))
    shown = re.findall(r"texts, (\d+) queries", text)
    assert shown == ["50", "400"]


def test_a_card_says_who_signed_and_what_was_checked() -> None:
    made = head()
    manifest = made.manifest
    signatures = (KEY.sign(manifest.digest), OTHER.sign(manifest.digest))
    text = to_markdown(CardSources(manifest, signatures=signatures, vendor_keys=(KEY.public,)))
    rows = [line for line in text.splitlines() if line.startswith("| key ")]
    assert KEY.public.id.hex() in rows[0]
    assert str(KEY.public) in rows[0]
    assert hashlib.sha256(KEY.public.data).hexdigest() in rows[0]
    assert rows[0].endswith("| valid |")
    assert OTHER.public.id.hex() in rows[1]
    assert rows[1].endswith("takes the vendor's public key |")
    forged = VendorSignature(KEY.public.id, OTHER.sign(manifest.digest).data)
    text = to_markdown(CardSources(manifest, signatures=(forged,), vendor_keys=(KEY.public,)))
    assert "| not valid |" in text


def test_nothing_in_a_card_runs_loads_or_leads_elsewhere() -> None:
    made = head(labels=(HOSTILE, "b", "c"), about={"dataset": {"name": HOSTILE}})
    page = to_html(to_markdown(CardSources(made.manifest, report(made.labels))), HOSTILE)
    assert "<script" not in page
    assert "href" not in page
    assert "&lt;script&gt;" in page
    # In a card that a vendor wrote by hand, too.
    other = to_html("<script>1</script> [a](http://b) ![c](http://d) <http://e>\n", "t")
    assert not {"<script", "<a ", "<img"} & {
        part for part in ("<script", "<a ", "<img") if part in other
    }


@pytest.mark.parametrize(
    "sources",
    [
        {"report": {"test_rows": 3}},
        {"report": {**report(("a",)), "accuracy": "high"}},
        {"attacks": [{"attack": "x"}]},
    ],
)
def test_a_damaged_source_is_refused(sources) -> None:
    with pytest.raises(ArtifactError, match="make them again"):
        to_markdown(CardSources(head().manifest, **sources))


def test_the_command_writes_both_forms_and_measures_the_encrypted_path(tmp_path) -> None:
    made = artifact(3, 32, name="model")
    made.save(tmp_path / "model", report=report(made.labels))
    (tmp_path / "attacks.json").write_text(json.dumps({"attacks": []}))
    arguments = ["card", tmp_path / "model", "--out", tmp_path / "out", "--rows", "3"]
    arguments += ["--attacks", tmp_path / "attacks.json", "--without-dp", tmp_path / "model"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    card = (tmp_path / "out" / "card.md").read_text("utf-8")
    assert "Measured: 3 random embeddings" in card
    assert "3 of 3 kept their top label" in card
    assert (tmp_path / "out" / "card.html").read_text("utf-8").startswith("<!doctype html>")
    missing = CliRunner().invoke(app, ["card", str(tmp_path / "model"), "--attacks", "nowhere"])
    assert missing.exit_code == 1


@pytest.fixture
def client(tmp_path):
    """A service of one model with a published card and one without, and the stored models."""
    for name in ("told", "untold"):
        made = artifact(3, 32, name=name)
        made.save(tmp_path / name, report=report(made.labels))
        publish(
            tmp_path / name, tmp_path / "store", card="# Mine <b>\n" if name == "told" else None
        )
    settings = Settings(store=tmp_path / "store", workers=1, insecure_no_tenants=True)
    return TestClient(create_app(settings))


def test_a_card_is_served_in_the_form_that_is_asked_for(client) -> None:
    found = client.get("/v1/models/told/card")
    assert found.text == "# Mine <b>\n"
    assert found.headers["content-type"] == "text/markdown; charset=utf-8"
    page = client.get("/v1/models/told/card", headers={"Accept": "text/html, */*"})
    assert "<h1>Mine &lt;b&gt;</h1>" in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert page.headers["vary"] == "Accept"


def test_a_private_report_is_never_served(client) -> None:
    """Without a published card, a service tells what the manifest tells, and no score."""
    found = client.get("/v1/models/untold/card").text
    assert "does not publish scores" in found
    assert "0.812" not in found


def test_cards_of_versions_and_of_nothing(client, problem) -> None:
    digest = client.get("/v1/models").json()["models"][0]["digest"]
    found = client.get(f"/v1/models/told/card?digest={digest}")
    assert found.status_code == 200
    assert found.headers["x-veilhead-model"] == digest
    problem(client.get("/v1/models/nothing/card"), 404, "model-not-found")
    problem(client.get(f"/v1/models/told/card?digest={'0' * 64}"), 404, "model-not-found")


def signers(client, name="told"):
    """Who signed the card that is served, by the header and by its bytes."""
    answer = client.get(f"/v1/models/{name}/card")
    digest = bytes.fromhex(answer.headers["x-veilhead-model"])
    found = read_signatures(answer.headers.get("x-veilhead-signature", ""))
    for one in found:
        key = {key.public.id: key.public for key in (KEY, OTHER)}[one.key_id]
        require_card_signature(digest, answer.content, [one], [key])
    return {one.key_id for one in found}


def test_a_card_is_served_with_the_signatures_of_that_card_alone(client, tmp_path) -> None:
    told, store = tmp_path / "told", tmp_path / "store"
    assert signers(client) == signers(client, "untold") == set()
    publish(told, store, signing_key=KEY)  # of the manifest: nobody looked at the card
    assert signers(client) == set()
    publish(told, store, signing_key=KEY, card="# Mine <b>\n")
    publish(told, store, signing_key=OTHER, card="# Mine <b>\n")
    assert signers(client) == {KEY.public.id, OTHER.public.id}
    publish(told, store, signing_key=OTHER, card="# Another\n")
    assert signers(client) == {OTHER.public.id}
    publish(told, store, card="# Unsigned\n")
    assert signers(client) == set()
    # What is signed is the Markdown: no signature comes with other bytes.
    publish(told, store, signing_key=KEY, card="# Mine\n")
    page = client.get("/v1/models/told/card", headers={"Accept": "text/html"})
    assert "x-veilhead-signature" not in page.headers


def test_a_card_of_another_version_is_not_published(tmp_path) -> None:
    made = head()
    made.save(tmp_path / "model")
    card = to_markdown(CardSources(made.manifest))
    publish(tmp_path / "model", tmp_path / "store", card=card)
    with pytest.raises(
        StoreError, match=f"the card is of the version {made.manifest.digest.hex()}"
    ):
        publish(tmp_path / "model", tmp_path / "store", card=card, allow_bulk=True)


def test_a_later_card_replaces_the_first_and_a_damaged_one_is_an_error(client, tmp_path) -> None:
    publish(tmp_path / "told", tmp_path / "store", card="# Second\n")
    assert client.get("/v1/models/told/card").text == "# Second\n"
    publish(tmp_path / "told", tmp_path / "store")  # says nothing about the card
    assert client.get("/v1/models/told/card").text == "# Second\n"
    (card,) = (tmp_path / "store" / "told").glob("*.card.md")
    card.write_bytes(b"\xff")
    assert client.get("/v1/models/told/card").status_code == 503
