"""Publishing into a store that others change, or that is damaged."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from datetime import UTC, datetime

import pytest
from support.heads import artifact

from veilhead_models.artifact import (
    BACKBONE_DIRECTORY,
    ENCRYPTED_HEAD_FILE,
    HEAD_FILE,
    MANIFEST_FILE,
    HeadArtifact,
)
from veilhead_protocol.errors import StoreError
from veilhead_service.head_encryption import HeadKey
from veilhead_service.model_store import ModelStore, publish, retire
from veilhead_service.retirement import Retirement

KEY = HeadKey(bytes(range(32)))
LATER = Retirement(datetime(2031, 1, 1, tzinfo=UTC))


# --- one at a time --------------------------------------------------------------------------------


def test_publishing_and_retiring_wait_for_each_other(vendor):
    first = vendor.publish(artifact(2, 8, seed=1))
    second = vendor.save(artifact(2, 8, seed=2))
    models = ModelStore(vendor.store)
    with (vendor.store / ".lock").open() as other, ThreadPoolExecutor() as threads:
        fcntl.flock(other, fcntl.LOCK_EX)
        published = threads.submit(publish, second, vendor.store)
        retired = threads.submit(retire, vendor.store, "model", first, LATER)
        for waiting in (published, retired):
            with pytest.raises(NotYet):
                waiting.result(0.3)
        assert models.current("model").manifest.digest.hex() == first
        assert models.current("model").retirement is None
        fcntl.flock(other, fcntl.LOCK_UN)
        assert published.result(30).digest == models.current("model").manifest.digest
        assert retired.result(30) == first


def test_a_publisher_that_was_killed_holds_nobody_up(vendor):
    vendor.publish(artifact(2, 8, seed=1))
    source = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(1)"
    command = [sys.executable, "-c", f"{source}; sys.stdout.flush(); sys.stdin.read()"]
    with (
        subprocess.Popen(
            [*command, str(vendor.store / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder,
        ThreadPoolExecutor() as threads,
    ):
        assert holder.stdout.read(1) == b"1"
        waiting = threads.submit(vendor.publish, artifact(2, 8, seed=2))
        with pytest.raises(NotYet):
            waiting.result(0.3)
        holder.kill()
        waiting.result(30)


def test_publishers_at_once_leave_one_version_that_is_not_retired(vendor, monkeypatch):
    """Each retires what the name stood for when its turn came, so that none is forgotten."""
    directories = [vendor.save(artifact(2, 8, seed=seed)) for seed in range(5)]
    at_once = ThreadPoolExecutor(5)
    with at_once:
        done = [
            at_once.submit(publish, directory, vendor.store, retire_previous=LATER)
            for directory in directories
        ]
        assert len({task.result(30).digest for task in done}) == 5
    models = ModelStore(vendor.store)
    found = {digest: model.retirement for digest, model in models.versions("model")}
    assert [digest for digest, end in found.items() if end is None] == [
        models.current_digest("model")
    ]


def test_a_store_is_not_made_by_retiring(tmp_path):
    with pytest.raises(StoreError, match="no store"):
        retire(tmp_path / "absent", "model", None, LATER)
    assert not (tmp_path / "absent").exists()


# --- damage ---------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(directory):
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.fixture
def with_backbone(backbone_directory, backbone_section):
    return artifact(3, 8).with_backbone(backbone_directory, backbone_section)


@pytest.mark.parametrize("head_key", [None, KEY], ids=["plaintext", "encrypted"])
@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (cut, MANIFEST_FILE),
        (flip, MANIFEST_FILE),
        (lambda path: path.unlink(), MANIFEST_FILE),
        (flip, "HEAD"),
        (cut, "HEAD"),
        (lambda path: path.unlink(), "HEAD"),
        (flip, f"{BACKBONE_DIRECTORY}/model.safetensors"),
        (lambda path: path.unlink(), f"{BACKBONE_DIRECTORY}/config.json"),
        (empty, "."),
    ],
)
def test_publishing_again_repairs_a_damaged_version(vendor, with_backbone, damage, part, head_key):
    directory = vendor.save(with_backbone)
    digest = publish(directory, vendor.store, head_key=head_key).digest.hex()
    version = vendor.version("model", digest)
    head = HEAD_FILE if head_key is None else ENCRYPTED_HEAD_FILE
    damage(version / part.replace("HEAD", head))
    publish(directory, vendor.store, head_key=head_key)

    models = ModelStore(vendor.store, head_key_id=KEY.id)
    assert models.current("model").manifest.digest.hex() == digest

    def decrypted(found):
        return KEY.decrypt((version / ENCRYPTED_HEAD_FILE).read_bytes(), found)

    loaded = HeadArtifact.load(version, decrypt_head=None if head_key is None else decrypted)
    assert (loaded.weight == with_backbone.weight).all()
    assert (version / HEAD_FILE).exists() == (head_key is None)
    assert {path.name for path in version.parent.iterdir()} == {digest, "current"}


def test_a_whole_version_is_not_written_again(vendor, with_backbone):
    directory = vendor.save(with_backbone)
    version = vendor.version("model", publish(directory, vendor.store).digest.hex())
    before = {path: path.stat().st_ino for path in [version, *version.rglob("*")]}
    publish(directory, vendor.store)
    assert {path: path.stat().st_ino for path in [version, *version.rglob("*")]} == before


@pytest.mark.parametrize("part", [MANIFEST_FILE, ENCRYPTED_HEAD_FILE])
def test_without_the_head_key_a_damaged_encrypted_version_says_what_to_do(vendor, part):
    """It is not silently replaced by a plaintext head."""
    head = artifact(3, 8)
    version = vendor.version("model", vendor.publish(head, head_key=KEY))
    (version / part).write_bytes(b"damaged")
    with pytest.raises(StoreError, match="--head-key-file"):
        vendor.publish(head)
    assert not (version / HEAD_FILE).exists()
    vendor.publish(head, head_key=KEY)
    assert ModelStore(vendor.store, head_key_id=KEY.id).current("model") is not None


def test_a_damaged_current_is_replaced(vendor):
    head = artifact(2, 8)
    digest = vendor.publish(head)
    (vendor.store / "model" / "current").write_text("nonsense")
    vendor.publish(head)
    assert ModelStore(vendor.store).current_digest("model") == digest
