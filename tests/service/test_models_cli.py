"""`veilhead-server publish`, `retire`, `models`, `signing-key` and `head-key`."""

from __future__ import annotations

import json
import stat

import pytest
from support.heads import artifact
from typer.testing import CliRunner

from veilhead_protocol.signatures import VendorKey
from veilhead_service.cli import app
from veilhead_service.head_encryption import HeadKey
from veilhead_service.model_store import ModelStore
from veilhead_service.signing import SigningKey

FIRST, SECOND = (artifact(4, 32, seed=seed, name="model") for seed in (1, 2))
COMPACT = artifact(4, 32, parameters="compact", name="model")


@pytest.fixture
def run(vendor):
    def invoke(*arguments, store=True, code=0):
        at = ("--store", vendor.store) if store else ()
        result = CliRunner().invoke(app, [str(item) for item in (*arguments, *at)])
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

    return invoke


@pytest.fixture
def listed(run):
    return lambda: json.loads(run("models", "list", "--json").stdout)["models"]


def test_signing_keys_are_made_and_shown(run, tmp_path):
    file = tmp_path / "vendor.pem"
    made = run("signing-key", "new", file, store=False).stdout
    assert VendorKey.parse(made) == SigningKey.load(file).public
    assert run("signing-key", "show", file, store=False).stdout == made
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = file.read_bytes()
    assert "exists" in run("signing-key", "new", file, store=False, code=1).stderr
    assert file.read_bytes() == before
    run("signing-key", "show", tmp_path / "absent", store=False, code=1)


def test_head_keys_are_made_and_not_shown(run, tmp_path):
    file = tmp_path / "head.key"
    result = run("head-key", "new", file, store=False)
    key = HeadKey.load(file)
    assert result.stdout.strip() == key.id.hex()
    assert file.read_text().strip().partition(":")[2] not in result.output
    run("head-key", "new", file, store=False, code=1)
    assert HeadKey.load(file).data == key.data


def test_the_life_of_a_model(run, listed, vendor, tmp_path):
    signing, heads = tmp_path / "vendor.pem", tmp_path / "head.key"
    run("signing-key", "new", signing, store=False)
    run("head-key", "new", heads, store=False)
    run("publish", vendor.save(FIRST))
    options = ("--sign-with", signing, "--head-key-file", heads)
    run("publish", vendor.save(SECOND), *options, "--retire-previous-after", "2100-01-01")
    old, new = (head.manifest.digest.hex() for head in (FIRST, SECOND))
    rows = {row["digest"]: row for row in listed()}
    assert rows.keys() == {old, new}
    size = sum(path.stat().st_size for path in vendor.version("model", new).iterdir())
    assert rows[new] == {
        "name": "model",
        "digest": new,
        "current": True,
        "state": "served",
        "until": None,
        "head": "encrypted",
        "signed_by": [SigningKey.load(signing).public.id.hex()],
        "bytes": size,
    }
    assert (rows[old]["state"], rows[old]["until"]) == ("served", "2100-01-01T00:00:00Z")
    assert (rows[old]["current"], rows[old]["head"], rows[old]["signed_by"]) == (
        False,
        "plaintext",
        [],
    )
    assert "not served any more" in run("retire", "model", old, "--after", "2020-01-01").stdout
    assert (
        "until 2100-06-01T12:00:00Z" in run("retire", "model", "--after", "2100-06-01T12:00").stdout
    )
    rows = {row["digest"]: row for row in listed()}
    assert [rows[item]["state"] for item in (old, new)] == ["retired", "served"]
    shown = run("models", "list").stdout
    for text in (old, new, "retired", "encrypted", "2100-06-01T12:00:00Z"):
        assert text in shown
    run("retire", "model", old, "--withdraw")
    assert {row["state"] for row in listed()} == {"served"}


def test_the_head_key_of_the_environment_is_used(run, listed, vendor, tmp_path, monkeypatch):
    HeadKey.create(tmp_path / "head.key")
    monkeypatch.setenv("VEILHEAD_SERVER_HEAD_KEY_FILE", str(tmp_path / "head.key"))
    run("publish", vendor.save(FIRST))
    assert [row["head"] for row in listed()] == ["encrypted"]


def test_where_plaintext_heads_are_forbidden_none_is_published(run, vendor, monkeypatch):
    monkeypatch.setenv("VEILHEAD_SERVER_REQUIRE_ENCRYPTED_HEADS", "true")
    assert "--head-key-file" in run("publish", vendor.save(FIRST), code=1).stderr
    assert not vendor.store.exists()


def test_a_damaged_version_is_shown_beside_the_others(run, listed, vendor):
    sound, damaged = vendor.publish(FIRST), vendor.publish(SECOND)
    (vendor.version("model", damaged) / "manifest.json").write_text("{}")
    rows = {row["digest"]: row for row in listed()}
    assert (rows[sound]["state"], rows[damaged]["state"]) == ("served", "damaged")
    assert "manifest.json" in rows[damaged]["error"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("retire", "absent", "--after", "2100-01-01"),
        ("retire", "model", "--after", "soon"),
        ("retire", "model", "0" * 64, "--after", "2100-01-01"),
        ("publish", "absent"),
        ("publish", "absent", "--sign-with", "absent"),
        ("publish", "absent", "--head-key-file", "absent"),
        ("models", "list"),
    ],
)
def test_errors_are_one_line_and_status_one(run, arguments):
    result = run(*arguments, code=1)
    assert result.stderr.startswith("veilhead-server: ")


@pytest.mark.parametrize("arguments", [(), ("--after", "2100-01-01", "--withdraw")])
def test_retire_is_told_what_to_do(run, vendor, arguments):
    vendor.publish(FIRST)
    run("retire", "model", *arguments, code=2)


def test_a_policy_of_deidentification_is_set_when_published(run, vendor):
    directory = vendor.save(FIRST)
    plain = run("publish", directory).stdout
    asked = run("publish", directory, "--deidentify").stdout
    assert plain != asked  # another digest: clients that pinned one do not get the other
    store = ModelStore(vendor.store)
    model = store.current("model")
    assert model.manifest.policy.deidentify
    assert model.manifest.digest.hex() in asked
    assert model.manifest.head == FIRST.manifest.head


def test_a_policy_is_put_on_when_published_and_says_who_sees_to_what(run, vendor):
    directory = vendor.save(FIRST)
    lines = run("publish", directory, "--policy", "manufacturing").stdout
    assert "query_budget" in lines
    assert "enforced by the service" in lines
    assert ModelStore(vendor.store).current("model").manifest.policy.preset == "manufacturing"
    run("publish", directory, "--policy", "military", code=2)


def test_a_violation_of_the_policy_is_named_and_nothing_is_published(run, vendor):
    refused = run("publish", vendor.save(COMPACT), "--policy", "medical", code=1)
    assert "policy.minimum_parameters: the policy medical asks for standard" in refused.stderr
    assert ModelStore(vendor.store).current("model") is None
    standard = vendor.save(artifact(4, 32, parameters="standard", name="standard"))
    refused = run("publish", standard, "--policy", "finance", code=1)
    assert "policy.privacy: the policy finance asks for a head trained with" in refused.stderr
    assert ModelStore(vendor.store).current("standard") is None
