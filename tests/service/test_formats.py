"""A store and its artefacts of every format that there was: read, or refused by name."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from support.heads import artifact
from typer.testing import CliRunner

from veilhead_models.artifact import ARTIFACT_FORMAT, ENCRYPTED_HEAD_FILE, FORMAT_FILE, HeadArtifact
from veilhead_protocol.errors import ArtifactError, HeadKeyError, StoreError
from veilhead_protocol.formats import format_complaint
from veilhead_protocol.manifest import FORMAT as MANIFEST_FORMAT
from veilhead_service.cli import app as command
from veilhead_service.head_encryption import HEADER_BYTES, MAGIC, HeadKey, key_id_of
from veilhead_service.head_loading import HeadLoader, load_artifact
from veilhead_service.model_store import ModelStore, publish, retire
from veilhead_service.settings import Settings
from veilhead_service.store_versions import STORE_FORMAT, check_store_format

SAMPLES = Path(__file__).parents[1] / "vectors" / "stores"


def _keep():
    specification = importlib.util.spec_from_file_location("veilhead_keep", SAMPLES / "keep.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


keep = _keep()
CURRENT = keep.current_sample()
OTHERS = sorted(set(SAMPLES.glob("*.json")) - {CURRENT})


def shape(files):
    """What a sample is made of: its files' places, and the fields of those that are JSON."""

    def fields(value):
        if isinstance(value, dict):
            return {name: fields(inside) for name, inside in value.items()}
        return [fields(value[0])] if isinstance(value, list) and value else None

    found = {}
    for path, content in files.items():
        inside = fields(json.loads(content)) if path.endswith("manifest.json") else None
        found[re.sub(r"[0-9a-f]{64}", "DIGEST", path), json.dumps(inside, sort_keys=True)] = None
    return sorted(found)


def contents(root):
    paths = [path for part in ("artifacts", "store") for path in (root / part).rglob("*")]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths if path.is_file()}


# --- samples --------------------------------------------------------------------------------------


def test_a_sample_of_the_formats_of_today_is_kept():
    assert CURRENT.is_file(), "run `python tests/vectors/stores/keep.py` and commit what it writes"


def test_the_kept_sample_is_read_and_serves(tmp_path):
    """What was published before this code was written is served by it, and needs no repair."""
    root = keep.unpack(CURRENT, tmp_path)
    for directory in (root / "artifacts").iterdir():
        assert HeadArtifact.load(directory).name == directory.name
    store = root / "store"
    models = ModelStore(store, head_key_id=keep.KEY.id)
    found = {name: dict(models.versions(name)) for name in models.names()}
    assert {name: len(versions) for name, versions in found.items()} == {"plain": 2, "quiet": 1}
    loader = HeadLoader(keep.KEY)
    for versions in found.values():
        for digest, model in versions.items():
            assert not isinstance(model, StoreError), model
            assert loader.load(model.directory).manifest.digest.hex() == digest
    (signed,) = [model for model in found["plain"].values() if model.signatures]
    assert signed.retirement is not None
    assert signed.card().markdown == "# A made-up head\n"
    before = contents(root)
    assert publish(root / "artifacts" / "quiet", store).name == "quiet"
    publish(root / "artifacts" / "plain", store, head_key=keep.KEY, allow_bulk=True)
    after = contents(root)
    changed = {path for path in before if after.get(path) != before[path]}
    assert {Path(path).name for path in changed} == {"head.safetensors"}  # which is encrypted now


def test_a_format_that_changed_has_another_number(tmp_path):
    """What this code writes has the files and fields of the sample of its own numbers."""
    keep.make(tmp_path / "now")
    now = contents(tmp_path / "now")
    kept = contents(keep.unpack(CURRENT, tmp_path / "kept"))
    assert shape(now) == shape(kept), "raise the number of the format that changed"
    assert now["store/.format"] == kept["store/.format"]
    del now["store/.encrypted"]
    assert shape(now) != shape(kept)  # it would be noticed


@pytest.mark.parametrize("sample", OTHERS, ids=lambda path: path.stem)
def test_an_older_store_is_refused_by_name_with_what_to_do(sample, tmp_path, monkeypatch):
    root = keep.unpack(sample, tmp_path)
    store, before = root / "store", contents(root)
    named = rf"veilhead-[a-z]+/\d.*({STORE_FORMAT}|{ARTIFACT_FORMAT}|{MANIFEST_FORMAT})"
    models = ModelStore(store, head_key_id=keep.KEY.id)
    assert models.names() == ["plain", "quiet"]
    for name in models.names():
        with pytest.raises(StoreError, match=f"(?s){named}.*again with this version"):
            models.current(name)
    for directory in (root / "artifacts").iterdir():
        with pytest.raises(ArtifactError, match=f"(?s){named}.*again with this version"):
            HeadArtifact.load(directory)
        with pytest.raises(ArtifactError, match="again with this version"):
            publish(directory, store)
    assert contents(root) == before
    if not sample.stem.startswith(STORE_FORMAT.removeprefix("veilhead-").replace("/", "-")):
        check_that_nobody_takes(store, tmp_path, monkeypatch)
    assert contents(root) == before


def check_that_nobody_takes(store, tmp_path, monkeypatch):
    """Nobody reads or changes a store of another format than the code's."""
    new = tmp_path / "new"
    artifact(2, 8, name="new").save(new)
    with pytest.raises(StoreError, match="publish its models again with this version"):
        publish(new, store)
    with pytest.raises(StoreError, match="publish its models again with this version"):
        retire(store, "plain", None, None)
    monkeypatch.setenv("COLUMNS", "300")
    # It ends the handlers of other libraries, and one of them closes what pytest captures with.
    monkeypatch.setattr("veilhead_service.logs.configure", lambda *_: None)
    for arguments in (("run",), ("models", "list"), ("publish", str(new))):
        done = CliRunner().invoke(command, [*arguments, "--store", str(store)])
        assert done.exit_code == 1
        assert len(done.stderr.strip().splitlines()) == 1
        assert "again with this version" in done.stderr
        assert STORE_FORMAT in done.stderr


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "things/1, .* reads things/2: do it again"),
        ("things/1", "things/1, .* reads things/2: do it again"),
        ("things/3", "things/3, .* reads things/2: upgrade Veilhead"),
        ("things/10", "things/10, .* upgrade Veilhead"),
        ("things/02", "expected things/2: do it again"),
        ("others/3", "'others/3', expected things/2: do it again"),
        ("", "'', expected things/2"),
        ("x" * 10_000, "'x{40}', expected things/2"),
    ],
)
def test_formats_are_refused_both_ways(found, said):
    assert re.search(said, format_complaint(found, "things/2", if_older="do it again"))
    assert format_complaint("things/2", "things/2", if_older="do it again") is None


def newer(name):
    kind, _, number = name.partition("/")
    return f"{kind}/{int(number) + 1}"


def test_a_newer_store_is_refused_by_everybody(vendor):
    head = artifact(2, 8)
    vendor.publish(head)
    mark = vendor.store / ".format"
    assert mark.read_text() == f"{STORE_FORMAT}\n"
    mark.write_text(f"{newer(STORE_FORMAT)}\n")
    expected = f"{newer(STORE_FORMAT)}, .*{STORE_FORMAT}: upgrade Veilhead"
    for refused in (
        lambda: ModelStore(vendor.store).current("model"),
        lambda: vendor.publish(artifact(2, 8, seed=2)),
        lambda: retire(vendor.store, "model", None, None),
        lambda: check_store_format(vendor.store),
    ):
        with pytest.raises(StoreError, match=expected):
            refused()
    assert mark.read_text() == f"{newer(STORE_FORMAT)}\n"


def test_a_newer_artefact_is_refused(vendor):
    directory = vendor.save(artifact(2, 8))
    version = vendor.version("model", publish(directory, vendor.store).digest.hex())
    assert (version / FORMAT_FILE).read_text() == f"{ARTIFACT_FORMAT}\n"
    expected = f"{newer(ARTIFACT_FORMAT)}, .*{ARTIFACT_FORMAT}: upgrade Veilhead"
    for place in (directory, version):
        (place / FORMAT_FILE).write_text(f"{newer(ARTIFACT_FORMAT)}\n")
    with pytest.raises(ArtifactError, match=expected):
        HeadArtifact.load(directory)
    with pytest.raises(StoreError, match=expected):
        ModelStore(vendor.store).current("model")
    with pytest.raises(StoreError, match=expected):
        load_artifact(version, None)


def test_a_newer_manifest_is_refused(vendor):
    directory = vendor.save(artifact(2, 8))
    version = vendor.version("model", publish(directory, vendor.store).digest.hex())
    expected = f"{newer(MANIFEST_FORMAT)}, .*{MANIFEST_FORMAT}: upgrade Veilhead"
    for place in (directory, version):
        content = (place / "manifest.json").read_text()
        assert MANIFEST_FORMAT in content
        content = content.replace(MANIFEST_FORMAT, newer(MANIFEST_FORMAT))
        (place / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match=expected):
        HeadArtifact.load(directory)
    with pytest.raises(StoreError, match=expected):
        ModelStore(vendor.store).current("model")


def test_a_newer_encrypted_head_is_refused(vendor):
    key = HeadKey(bytes(range(32)))
    version = vendor.version("model", vendor.publish(artifact(2, 8), head_key=key))
    content = bytearray((version / ENCRYPTED_HEAD_FILE).read_bytes())
    content[len(MAGIC)] += 1
    expected = "veilhead-encrypted-head/2, .*veilhead-encrypted-head/1: upgrade Veilhead"
    with pytest.raises(HeadKeyError, match=expected):
        key_id_of(bytes(content[:HEADER_BYTES]))
    (version / ENCRYPTED_HEAD_FILE).write_bytes(content)
    with pytest.raises(HeadKeyError, match=expected):
        ModelStore(vendor.store, head_key_id=key.id).current("model")


def test_an_empty_directory_becomes_a_store_of_todays_format(tmp_path):
    store = tmp_path / "store"
    check_store_format(store)
    store.mkdir()
    (store / "lost+found").mkdir()
    check_store_format(store)
    assert ModelStore(store).names() == []
    artifact(2, 8).save(tmp_path / "model")
    publish(tmp_path / "model", store)
    assert (store / ".format").read_text() == f"{STORE_FORMAT}\n"
    assert Settings(store=store).store == store


def test_an_artefact_of_an_older_format_may_be_saved_over(tmp_path):
    head = artifact(2, 8)
    head.save(tmp_path / "model")
    (tmp_path / "model" / FORMAT_FILE).unlink()
    with pytest.raises(ArtifactError, match="veilhead-artifact/1"):
        HeadArtifact.load(tmp_path / "model")
    head.save(tmp_path / "model")
    assert HeadArtifact.load(tmp_path / "model").name == "model"
