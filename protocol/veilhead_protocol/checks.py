"""Checks of an installation: what both `doctor` commands have in common."""

from __future__ import annotations

import json
import platform
import stat
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from veilhead_protocol import seal_io
from veilhead_protocol.parameters import PARAMETER_SETS

#: The oldest Python that the project runs on.
_PYTHON = (3, 11)


class Outcome(StrEnum):
    """What a check found."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One line of a doctor's report.

    Attributes:
        name: what was looked at.
        outcome: what came of it; only `FAIL` makes the command fail.
        found: what was found.
        advice: what to do about it; empty when there is nothing to do.
    """

    name: str
    outcome: Outcome
    found: str
    advice: str = ""


def passed(name: str, found: str) -> Check:
    """A check with nothing to do about."""
    return Check(name, Outcome.OK, found)


def render(checks: Sequence[Check], *, as_json: bool) -> str:
    """The report, for people or as JSON."""
    if as_json:
        return json.dumps([asdict(check) for check in checks], indent=2)
    wide = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.outcome:<4}  {check.name:<{wide}}  {check.found}")
        if check.advice:
            lines.append(f"{'':<{wide + 8}}-> {check.advice}")
    return "\n".join(lines)


def healthy(checks: Iterable[Check]) -> bool:
    """Whether no check failed."""
    return all(check.outcome is not Outcome.FAIL for check in checks)


def installed(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_python() -> Check:
    """The interpreter."""
    found = tuple(int(part) for part in platform.python_version_tuple()[:2])
    if found < _PYTHON:
        return Check("python", Outcome.FAIL, platform.python_version(), "use Python 3.11 or newer")
    return passed("python", platform.python_version())


def check_packages(needed: Sequence[str], extra: str) -> list[Check]:
    """Packages that must be there, each with its version; `extra` brings them."""
    checks = []
    for package in needed:
        found = installed(package)
        checks.append(
            Check(package, Outcome.FAIL, "not installed", f"pip install '{extra}'")
            if found is None
            else passed(package, found)
        )
    return checks


def check_parameters() -> list[Check]:
    """Whether SEAL builds each parameter set, and which serialisation it speaks."""
    checks = []
    for parameters in PARAMETER_SETS.values():
        name = f"parameters {parameters.name}"
        try:
            major, minor = seal_io.runtime(parameters).version
        except (AssertionError, OSError, RuntimeError, ValueError) as error:
            checks.append(
                Check(
                    name,
                    Outcome.FAIL,
                    f"SEAL refuses them ({type(error).__name__})",
                    "install a tenseal that this version was tested with: 0.3.18",
                )
            )
        else:
            checks.append(
                passed(name, f"id {parameters.id.hex()[:12]}, SEAL serialisation {major}.{minor}")
            )
    return checks


def check_private(name: str, path: Path, *, advice: str) -> Check:
    """A file or directory that nobody but its owner may read or write."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return Check(name, Outcome.FAIL, f"{path} has mode {mode:04o}", advice)
    return passed(name, f"{path} has mode {mode:04o}")


def check_not_writable_by_others(name: str, path: Path, *, advice: str) -> Check:
    """A directory in which only its owner and group may write."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o002:
        return Check(name, Outcome.FAIL, f"{path} has mode {mode:04o}", advice)
    return passed(name, f"{path} has mode {mode:04o}")
