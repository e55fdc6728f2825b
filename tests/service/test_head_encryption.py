"""Private heads at rest: what is in the file, and what happens to those that meddle with it."""

from __future__ import annotations

import copy
import os
import pickle
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from support.heads import artifact

from veilhead_models.artifact import ENCRYPTED_HEAD_FILE, HEAD_FILE, HeadArtifact
from veilhead_protocol.errors import HeadKeyError, ModelUnavailableError, SecretFileError
from veilhead_service import head_encryption
from veilhead_service.app import create_app
from veilhead_service.head_encryption import HeadKey, find_head_key, key_id_of
from veilhead_service.head_loading import FAILURE_SECONDS, HeadLoader, load_artifact
from veilhead_service.model_store import ModelStore, publish
from veilhead_service.settings import Settings

KEY = HeadKey(bytes(range(32)))
OTHER = HeadKey(bytes(range(1, 33)))
DIGEST = bytes(range(100, 132))
TEXT = "aes256gcm:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="

#: The file of b"golden head" under KEY, for DIGEST, with the nonce 00 01 ... 0b.
GOLDEN = bytes.fromhex(
    "5645494c48454144"
    "01"
    "000000"
    "88715bfcc8c4f33f"
    "000102030405060708090a0b"
    "206dba7fa08be273e820f3bcdeef626d4885d5a1bc1b1b64d3dc06"
)


# --- the format -----------------------------------------------------------------------------------


def test_golden_bytes_decrypt():
    assert KEY.decrypt(GOLDEN, DIGEST) == b"golden head"
    assert key_id_of(GOLDEN) == KEY.id


def test_golden_bytes_are_what_is_written(monkeypatch):
    monkeypatch.setattr(head_encryption.secrets, "token_bytes", lambda size: bytes(range(size)))
    assert KEY.encrypt(b"golden head", DIGEST) == GOLDEN


@given(st.binary(max_size=300), st.binary(min_size=32, max_size=32))
def test_what_is_encrypted_decrypts(head, digest):
    assert KEY.decrypt(KEY.encrypt(head, digest), digest) == head


def test_the_same_head_twice_has_nothing_in_common():
    first, second = (KEY.encrypt(bytes(1000), DIGEST) for _ in range(2))
    assert first[:20] == second[:20]
    assert first[20:32] != second[20:32]
    assert sum(a == b for a, b in zip(first[32:], second[32:], strict=True)) < 50


@given(st.integers(0, 8 * len(GOLDEN) - 1))
def test_every_flipped_bit_is_noticed(place):
    changed = bytearray(GOLDEN)
    changed[place // 8] ^= 1 << place % 8
    with pytest.raises(HeadKeyError):
        KEY.decrypt(bytes(changed), DIGEST)


@pytest.mark.parametrize("length", range(len(GOLDEN)))
def test_every_truncation_is_noticed(length):
    with pytest.raises(HeadKeyError):
        KEY.decrypt(GOLDEN[:length], DIGEST)


@given(st.binary(max_size=100).map(lambda rest: GOLDEN[:20] + rest) | st.binary(max_size=100))
def test_any_other_content_is_one_error(content):
    with pytest.raises(HeadKeyError):
        KEY.decrypt(content, DIGEST)


def test_an_appended_byte_is_noticed():
    with pytest.raises(HeadKeyError):
        KEY.decrypt(GOLDEN + b"\0", DIGEST)


def test_the_nonce_of_another_file_is_noticed():
    other = KEY.encrypt(b"golden head", DIGEST)
    with pytest.raises(HeadKeyError):
        KEY.decrypt(GOLDEN[:20] + other[20:32] + GOLDEN[32:], DIGEST)


def test_the_head_of_another_version_is_noticed():
    with pytest.raises(HeadKeyError, match="another version"):
        KEY.decrypt(GOLDEN, bytes(32))


def test_another_key_is_named_by_its_id():
    with pytest.raises(HeadKeyError, match=f"{KEY.id.hex()}.*{OTHER.id.hex()}"):
        OTHER.decrypt(GOLDEN, DIGEST)


def test_another_key_that_claims_the_same_id_is_noticed():
    claimed = OTHER.encrypt(b"golden head", DIGEST)
    with pytest.raises(HeadKeyError):
        KEY.decrypt(claimed[:12] + KEY.id + claimed[20:], DIGEST)


# --- keys -----------------------------------------------------------------------------------------


def test_a_new_key_is_private_and_never_replaces_another(tmp_path):
    path = tmp_path / "head.key"
    key = HeadKey.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert HeadKey.load(path).data == key.data
    with pytest.raises(SecretFileError, match="exists"):
        HeadKey.create(path)
    assert HeadKey.load(path).data == key.data
    assert HeadKey.create(tmp_path / "second.key").data != key.data


@pytest.mark.parametrize(
    "content", [b"", b"aes256gcm:", b"aes256gcm:AAAA", TEXT[10:].encode(), b"\xff" * 40, b"x" * 999]
)
def test_what_is_no_key_is_refused_without_being_shown(tmp_path, content):
    path = tmp_path / "head.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(SecretFileError) as caught:
        HeadKey.load(path)
    assert TEXT[10:30] not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o644])
def test_a_key_that_others_may_read_is_refused_without_being_shown(tmp_path, mode):
    path = tmp_path / "head.key"
    HeadKey.create(path)
    path.chmod(mode)
    with pytest.raises(SecretFileError, match=f"mode {mode:03o}.*chmod 600") as caught:
        HeadKey.load(path)
    assert path.read_text().strip() not in str(caught.value)
    path.chmod(0o400)
    assert HeadKey.load(path)


def test_a_key_comes_from_one_place(tmp_path):
    path = tmp_path / "head.key"
    path.write_text(TEXT)
    path.chmod(0o600)
    assert find_head_key(None, None) is None
    for key in (find_head_key(path, None), find_head_key(None, TEXT)):
        assert key is not None
        assert key.data == KEY.data
    with pytest.raises(SecretFileError, match="not both"):
        find_head_key(path, TEXT)
    with pytest.raises(SecretFileError):
        find_head_key(tmp_path / "absent", None)


def test_a_key_shows_and_copies_itself_nowhere():
    assert repr(KEY) == str(KEY) == f"HeadKey({KEY.id.hex()})"
    with pytest.raises(TypeError):
        pickle.dumps(KEY)
    with pytest.raises(TypeError):
        copy.deepcopy(KEY)


# --- in a store -----------------------------------------------------------------------------------


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_plaintext_head_never_touches_the_store(vendor, monkeypatch):
    """Not even in between: every file that is ever opened for writing there is looked at."""
    head = artifact(4, 32, name="quiet")
    secret = head.weight.tobytes()[:64]
    written = []
    sync = os.fsync

    def watching(descriptor):
        written.append(
            os.pread(descriptor, 1 << 20, 0)
            if not Path(f"/proc/self/fd/{descriptor}").is_dir()
            else b""
        )
        sync(descriptor)

    directory = vendor.save(head)
    monkeypatch.setattr(os, "open", _readable(os.open))
    monkeypatch.setattr(os, "fsync", watching)
    publish(directory, vendor.store, head_key=KEY)
    assert secret in (directory / HEAD_FILE).read_bytes()  # what is looked for is there to find
    assert any(written)
    found = [*written, *contents(vendor.store).values()]
    assert not any(secret in content for content in found)
    assert not list(vendor.store.rglob(HEAD_FILE))


def _readable(open_file):
    """os.open, with files that are opened for writing made readable for the test."""

    def opened(path, flags, *args, **options):
        if flags & os.O_WRONLY:
            flags = flags & ~os.O_WRONLY | os.O_RDWR
        return open_file(path, flags, *args, **options)

    return opened


def test_an_encrypted_head_is_the_head(vendor):
    head = artifact(4, 32, name="quiet")
    digest = vendor.publish(head, head_key=KEY)
    version = vendor.version("quiet", digest)
    assert stat.S_IMODE((version / ENCRYPTED_HEAD_FILE).stat().st_mode) == 0o600
    loaded = load_artifact(version, KEY)
    assert (loaded.weight == head.weight).all()
    assert loaded.manifest.digest.hex() == digest == head.manifest.digest.hex()


def test_heads_cannot_be_swapped_between_versions(vendor):
    first, second = (
        vendor.version(
            "quiet", vendor.publish(artifact(4, 32, seed=seed, name="quiet"), head_key=KEY)
        )
        for seed in (1, 2)
    )
    (first / ENCRYPTED_HEAD_FILE).write_bytes((second / ENCRYPTED_HEAD_FILE).read_bytes())
    with pytest.raises(HeadKeyError, match="altered or belongs to another version"):
        load_artifact(first, KEY)
    assert load_artifact(second, KEY).name == "quiet"


def test_a_plaintext_head_beside_an_encrypted_one_is_not_believed(vendor):
    """Who can write to the store cannot do without the key."""
    version = vendor.version("quiet", vendor.publish(artifact(4, 32, name="quiet"), head_key=KEY))
    (version / HEAD_FILE).write_bytes(artifact(4, 32, seed=9, name="quiet").head_bytes())
    assert (load_artifact(version, KEY).weight == artifact(4, 32).weight).all()
    with pytest.raises(HeadKeyError, match="no head key"):
        load_artifact(version, None)


def test_a_plaintext_head_in_place_of_the_encrypted_one_must_be_the_committed_one(vendor):
    version = vendor.version("quiet", vendor.publish(artifact(4, 32, name="quiet"), head_key=KEY))
    (version / ENCRYPTED_HEAD_FILE).unlink()
    (version / HEAD_FILE).write_bytes(artifact(4, 32, seed=9, name="quiet").head_bytes())
    with pytest.raises(ModelUnavailableError, match="commits to"):
        load_artifact(version, KEY)


def test_publishing_again_encrypts_and_changes_the_key(vendor):
    head = artifact(4, 32, name="quiet")
    directory = vendor.save(head)
    digest = publish(directory, vendor.store).digest.hex()
    version = vendor.version("quiet", digest)
    assert (version / HEAD_FILE).is_file()
    for key in (KEY, OTHER):
        publish(directory, vendor.store, head_key=key)
        assert not (version / HEAD_FILE).exists()
        assert (load_artifact(version, key).weight == head.weight).all()
    with pytest.raises(HeadKeyError):
        load_artifact(version, KEY)
    publish(directory, vendor.store)  # without a key it stays as it is
    assert (load_artifact(version, OTHER).weight == head.weight).all()
    assert isinstance(HeadArtifact.load(directory), HeadArtifact)


def test_a_store_without_the_key_serves_the_others(vendor):
    plain = vendor.publish(artifact(3, 16, name="plain"))
    secret = vendor.publish(artifact(4, 32, name="secret"), head_key=KEY)
    for key_id in (None, OTHER.id):
        models = ModelStore(vendor.store, head_key_id=key_id)
        assert models.current("plain").manifest.digest.hex() == plain
        with pytest.raises(HeadKeyError):
            models.current("secret")
        with pytest.raises(HeadKeyError):
            models.version("secret", bytes.fromhex(secret))
    mixed = ModelStore(vendor.store, head_key_id=KEY.id)
    assert [mixed.current(name).is_encrypted for name in mixed.names()] == [False, True]


def test_plaintext_heads_can_be_forbidden(vendor):
    vendor.publish(artifact(3, 16, name="plain"))
    vendor.publish(artifact(4, 32, name="secret"), head_key=KEY)
    models = ModelStore(vendor.store, head_key_id=KEY.id, require_encrypted_heads=True)
    assert models.current("secret").is_encrypted
    with pytest.raises(ModelUnavailableError, match="only encrypted"):
        models.current("plain")


def test_a_failure_is_remembered_for_half_a_minute(vendor):
    """A query for a version that cannot be loaded costs its service next to nothing."""
    now = 0.0
    version = vendor.version("quiet", vendor.publish(artifact(4, 32, name="quiet"), head_key=KEY))
    path = version / ENCRYPTED_HEAD_FILE
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    loader = HeadLoader(KEY, clock=lambda: now)
    with pytest.raises(HeadKeyError):
        loader.load(version)
    path.write_bytes(content)
    now = FAILURE_SECONDS - 1
    with pytest.raises(HeadKeyError):
        loader.load(version)
    now = FAILURE_SECONDS
    assert loader.load(version).manifest.name == "quiet"


def test_the_service_answers_with_encrypted_heads(vendor, make_service, problem, monkeypatch):
    """The key is in no worker's arguments or environment; a version under another key is 503."""
    heads = {name: artifact(4, 32, name=name) for name in ("quiet", "foreign", "plain")}
    vendor.publish(heads["plain"])  # before the store takes encrypted heads only
    vendor.publish(heads["quiet"], head_key=KEY)
    vendor.publish(heads["foreign"], head_key=OTHER)
    monkeypatch.setenv("VEILHEAD_SERVER_HEAD_KEY", TEXT)
    settings = Settings(store=vendor.store, workers=1, insecure_no_tenants=True)
    assert TEXT[10:] not in repr(settings)
    with TestClient(create_app(settings)) as client:
        service = make_service(client, heads)
        service.check_answers("quiet")
        service.check_answers("plain")
        listed = client.get("/v1/models").json()["models"]
        assert [row["name"] for row in listed] == ["plain", "quiet"]
        query = service.query("foreign")
        for answer in (client.get("/v1/models/foreign"), service.infer("foreign", query.data)):
            body = problem(answer, 503, "model-unavailable", sent=query.data, retryable=True)
            assert str(vendor.store) not in body["detail"]
        workers = [
            path
            for path in Path("/proc").glob("[0-9]*")
            if b"veilhead_service.worker" in _read(path / "cmdline")
            and _parent(path) == os.getpid()
        ]
        assert workers
        for path in workers:
            assert TEXT[10:].encode() not in _read(path / "cmdline") + _read(path / "environ")
            assert b"OMP_NUM_THREADS" in _read(path / "environ")


def _read(path):
    try:
        return path.read_bytes()
    except OSError:  # the process is gone, or another user's
        return b""


def _parent(path):
    fields = _read(path / "stat").rpartition(b")")[2].split()
    return int(fields[1]) if fields else None
