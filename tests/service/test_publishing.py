"""Publishing into a store that others change, or that is damaged."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

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
from veilhead_protocol.files import describe_file
from veilhead_protocol.manifest import OnnxSection
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
def with_backbone(backbone_directory, backbone_section, tmp_path):
    """A head with a backbone in both forms."""
    directory = shutil.copytree(backbone_directory, tmp_path / "both")
    (directory / "onnx").mkdir()
    for name in ("tokenizer.json", "model.onnx"):
        (directory / "onnx" / name).write_bytes(name.encode() * 100)
    onnx = OnnxSection(
        tokenizer=describe_file(directory, "onnx/tokenizer.json"),
        fp32=describe_file(directory, "onnx/model.onnx"),
    )
    section = backbone_section.model_copy(update={"onnx": onnx})
    return artifact(3, 8).with_backbone(directory, section)


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
        (flip, f"{BACKBONE_DIRECTORY}/onnx/model.onnx"),
        (lambda path: path.unlink(), f"{BACKBONE_DIRECTORY}/onnx/tokenizer.json"),
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

    # The backbone in both forms, too.
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


# --- encrypted heads stay encrypted ---------------------------------------------------------------


def holds(store, head):
    """Whether anything in the store, hidden files too, holds the head's weights."""
    secret = head.weight.tobytes()[:64]
    return any(secret in path.read_bytes() for path in store.rglob("*") if path.is_file())


class Killed(BaseException):
    """Nothing of this process happens any more."""


@contextmanager
def killed_at(step, monkeypatch):
    """A publisher that is killed at its `step`-th change of the disk.

    Whatever it would do afterwards, cleaning up included, does not happen either. Says in the end
    whether it came so far.
    """
    done = {"steps": 0, "killed": False}

    def mortal(change):
        def changing(*args, **options):
            done["steps"] += 1
            if done["steps"] >= step:
                done["killed"] = True
                raise Killed
            return change(*args, **options)

        return changing

    with monkeypatch.context() as patch:
        for owner, name in (
            (os, "fsync"),
            (os, "fchmod"),
            (os, "chdir"),
            (shutil, "rmtree"),
            (shutil, "copyfile"),
            (Path, "mkdir"),
            (Path, "rename"),
            (Path, "replace"),
            (Path, "unlink"),
        ):
            patch.setattr(owner, name, mortal(getattr(owner, name)))
        with suppress(Killed):
            yield done


def remove_the_encrypted_head(version):
    (version / ENCRYPTED_HEAD_FILE).unlink()


def move_aside(version):
    """As a publisher that was killed while it replaced a damaged version left it."""
    version.rename(version.with_name(f".old-{version.name}"))


@pytest.mark.parametrize(
    "damage",
    [None, remove_the_encrypted_head, empty, shutil.rmtree, move_aside],
    ids=lambda damage: getattr(damage, "__name__", "whole"),
)
@pytest.mark.parametrize(
    ("published", "options"),
    [
        ("same", {}),
        ("same", {"allow_bulk": True}),
        ("another version", {}),
        ("another version", {"retire_previous": LATER}),
        ("another model", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plainly",
)
def test_no_way_of_publishing_puts_a_plaintext_head_into_an_encrypted_store(
    vendor, published, options, damage
):
    first = artifact(2, 8, seed=1)
    head = {
        "same": first,
        "another version": artifact(2, 8, seed=2),
        "another model": artifact(2, 8, seed=3, name="another"),
    }[published]
    digest = vendor.publish(first, head_key=KEY)
    version = vendor.version("model", digest)
    if damage is not None:
        damage(version)
    if published == "same" and not options and damage in (None, move_aside):
        vendor.publish(head)  # which changes nothing
    else:
        with pytest.raises(StoreError, match="--head-key-file"):
            vendor.publish(head, **options)
    assert not holds(vendor.store, head)
    assert not list(vendor.store.rglob(HEAD_FILE))
    assert ModelStore(vendor.store).current_digest("model") == digest
    assert ModelStore(vendor.store).current_digest("another") is None
    found = vendor.publish(head, head_key=KEY, **options)  # and with the key it is published
    model = ModelStore(vendor.store, head_key_id=KEY.id).current(head.name)
    assert model.manifest.digest.hex() == found
    assert not holds(vendor.store, head)


def test_a_publisher_that_dies_at_any_step_leaves_no_way_to_a_plaintext_head(vendor, monkeypatch):
    """It was given the key; whoever publishes next was not."""
    head = artifact(2, 8)
    directory = vendor.save(head)
    for damaged in (False, True):
        step = 0
        while True:
            step += 1
            shutil.rmtree(vendor.store, ignore_errors=True)
            publish(directory, vendor.store, head_key=KEY)
            if damaged:
                (vendor.version("model", head.manifest.digest.hex()) / MANIFEST_FILE).unlink()
            with killed_at(step, monkeypatch) as done:
                publish(directory, vendor.store, head_key=KEY)
            with suppress(StoreError):
                publish(directory, vendor.store)
            assert not holds(vendor.store, head)
            publish(directory, vendor.store, head_key=KEY)
            assert ModelStore(vendor.store, head_key_id=KEY.id).current("model") is not None
            version = vendor.version("model", head.manifest.digest.hex())
            assert {path.name for path in version.parent.iterdir()} == {version.name, "current"}
            if not done["killed"]:
                break
        assert step > 4  # it died at several places


def test_a_publisher_without_a_key_that_died_leaves_no_plaintext_head_behind_encryption(
    vendor, monkeypatch
):
    """What it had half written is gone once the store takes encrypted heads only."""
    head = artifact(2, 8)
    directory = vendor.save(head)
    step, left = 0, 0
    while True:
        step += 1
        shutil.rmtree(vendor.store, ignore_errors=True)
        with killed_at(step, monkeypatch) as done:
            publish(directory, vendor.store)
        left += vendor.store.exists() and holds(vendor.store, head)
        version = vendor.version("model", head.manifest.digest.hex())
        if not version.exists():  # whatever is published next
            vendor.publish(artifact(2, 8, seed=2, name="another"), head_key=KEY)
            assert not holds(vendor.store, head)
        publish(directory, vendor.store, head_key=KEY)
        assert not holds(vendor.store, head)
        if not done["killed"]:
            break
    assert left > 4  # there was something to leave


def test_a_store_remembers_that_its_heads_are_encrypted(vendor):
    """By a file of its own, whatever is deleted; and without that file by the heads there."""
    version = vendor.version("model", vendor.publish(artifact(2, 8, seed=1), head_key=KEY))
    shutil.rmtree(version.parent)
    with pytest.raises(StoreError, match="--head-key-file"):
        vendor.publish(artifact(2, 8, seed=2))
    vendor.publish(artifact(2, 8, seed=1), head_key=KEY)
    (vendor.store / ".encrypted").unlink()
    with pytest.raises(StoreError, match="--head-key-file"):
        vendor.publish(artifact(2, 8, seed=2))
    assert not list(vendor.store.rglob(HEAD_FILE))


def test_a_plaintext_head_beside_an_encrypted_one_is_removed(vendor):
    head = artifact(2, 8)
    for head_key in (None, KEY):
        version = vendor.version("model", vendor.publish(head, head_key=KEY))
        (version / HEAD_FILE).write_bytes(head.head_bytes())
        vendor.publish(head, head_key=head_key)
        assert not holds(vendor.store, head)


def test_without_encrypted_heads_a_store_takes_plaintext_ones(vendor):
    for seed in (1, 2):
        vendor.publish(artifact(2, 8, seed=seed))
    assert ModelStore(vendor.store).current("model") is not None


def test_records_beside_a_version_that_cannot_be_read_are_told(vendor):
    """A version that no client would get is not said to be published."""
    head = artifact(2, 8, seed=1)
    version = vendor.version("model", vendor.publish(head, card="# A card\n"))
    other = vendor.publish(artifact(2, 8, seed=2))
    for suffix in (".signatures", ".card.signatures"):
        record = version.with_name(version.name + suffix)
        record.write_bytes(b"damaged")
        with pytest.raises(StoreError, match=suffix.replace(".", r"\.")):
            vendor.publish(head)
        assert ModelStore(vendor.store).current_digest("model") == other
        record.unlink()
    vendor.publish(head)
    assert ModelStore(vendor.store).current_digest("model") == version.name
