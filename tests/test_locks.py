"""What the image installs is locked: exact versions with hashes, all of them, as pyproject allows.

Nothing here needs a network: what a locked package needs is read of the installed one, of whatever
version. `test_packaging.py` installs the lock itself.
"""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

#: What each lock is for: the requirements that it answers.
LOCKS = {
    "service.txt": [
        *PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"]["service"],
    ],
    "build.txt": PROJECT["build-system"]["requires"],
}


@dataclass(frozen=True)
class Locked:
    version: str
    hashes: tuple[str, ...]


def read_lock(text):
    """Every package of a lock; a line that is none of the known forms is an error."""
    found = {}
    for entry in text.replace(" \\\n", " ").splitlines():
        if not entry.strip() or entry.lstrip().startswith("#"):
            continue
        requirement, *hashes = re.split(r" +--hash=", entry)
        parsed = Requirement(requirement)
        (pin,) = parsed.specifier
        assert pin.operator == "==", entry[:80]
        assert parsed.marker is None or parsed.marker.evaluate(), entry[:80]
        name = canonicalize_name(parsed.name)
        assert name not in found, name
        assert hashes, f"{name} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), name
        found[name] = Locked(pin.version, tuple(hashes))
    return found


@pytest.fixture(params=sorted(LOCKS))
def lock(request):
    """(packages, requirements) of a lock."""
    text = (ROOT / "locks" / request.param).read_text("ascii")
    return read_lock(text), LOCKS[request.param]


def unmet(packages, requirements):
    """Requirements that a lock does not answer, and packages of it that nobody needs.

    Follows what each package needs, as the installed one says.
    """
    problems, reached = set(), set()
    waiting = [(Requirement(line), frozenset()) for line in requirements]
    while waiting:
        wanted, extras = waiting.pop()
        environment = default_environment()
        if wanted.marker is not None and not any(
            wanted.marker.evaluate(environment | {"extra": extra}) for extra in extras or {""}
        ):
            continue
        name = canonicalize_name(wanted.name)
        if name not in packages:
            problems.add(f"{name} is missing")
            continue
        if not wanted.specifier.contains(packages[name].version, prereleases=True):
            problems.add(f"{name} {packages[name].version} is not {wanted.specifier}")
        if (name, frozenset(wanted.extras)) in reached:
            continue
        reached.add((name, frozenset(wanted.extras)))
        for line in importlib.metadata.requires(name) or ():
            waiting.append((Requirement(line), frozenset(wanted.extras)))
    unused = packages.keys() - {name for name, _ in reached}
    return problems | {f"{name} is needed by nobody" for name in unused}


def test_a_lock_answers_the_project_and_is_complete(lock):
    packages, requirements = lock
    assert unmet(packages, requirements) == set()


def test_what_a_lock_lacks_would_be_seen(lock):
    packages, requirements = lock
    for name in packages:
        rest = {other: found for other, found in packages.items() if other != name}
        assert f"{name} is missing" in unmet(rest, requirements)
    first = canonicalize_name(Requirement(requirements[0]).name)
    older = packages | {first: Locked("0.0.1", ("x",))}
    assert any(line.startswith(f"{first} 0.0.1 is not") for line in unmet(older, requirements))
    assert "pytest is needed by nobody" in unmet(packages | {"pytest": older[first]}, requirements)


def test_locks_and_constraints_agree(lock):
    pins = dict(
        re.findall(r"^([A-Za-z0-9-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    )
    packages, _ = lock
    common = pins.keys() & packages.keys()
    assert common
    assert {name: packages[name].version for name in common} == {
        name: pins[name] for name in common
    }


@pytest.mark.parametrize("name", sorted(LOCKS))
def test_a_lock_names_no_place(name):
    """No index, no address: where packages come from is for whoever installs them to say."""
    text = (ROOT / "locks" / name).read_text("ascii")
    assert not re.search(r"https?:|file:|//|@|\bindex\b|--(?!hash=)|\.(com|org|io)\b", text)


def test_the_image_has_no_torch(lock):
    packages, _ = lock
    assert not [name for name in packages if re.match(r"torch|nvidia|triton|transformers", name)]


@pytest.mark.parametrize(
    "line",
    ["numpy==2.0", "numpy>=2.0 --hash=sha256:" + "0" * 64, "numpy==2.0 --hash=md5:" + "0" * 32],
)
def test_a_line_without_an_exact_version_and_hash_is_refused(line):
    with pytest.raises((AssertionError, ValueError)):
        read_lock(line)


def test_the_python_of_the_image_is_one_that_the_project_supports():
    (version,) = re.findall(
        r"^ARG PYTHON_IMAGE=python:([0-9.]+)-slim$", (ROOT / "Dockerfile").read_text(), re.M
    )
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(version)
