"""Concrete ML 1.9, in an environment of its own, which is made here.

Its pins (torch 2.3, scikit-learn 1.5 and others) do not go together with this project's. The
environment lies in the project's cache, takes several gigabytes and some minutes once, and serves
every later run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from veilhead_benchmarks.heads import Head
from veilhead_benchmarks.rows import Row, added
from veilhead_protocol.files import cache_directory

VERSION: Final = "1.9.0"

#: Of Python, where its wheels exist, besides older ones that this project does not run on.
_PYTHONS: Final = ((3, 11), (3, 12))
_SCRIPT: Final = Path(__file__).with_name("concrete_ml_side.py")

#: One core, as every other system.
_ONE_CORE: Final = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_SECONDS: Final = 600.0


class PeerUnavailableError(Exception):
    """A peer cannot be measured here; the message says why."""


def concrete_ml_python() -> Path:
    """The Python of the environment, made first unless it is there.

    Raises:
        PeerUnavailableError: when it cannot be made.
    """
    if sys.version_info[:2] not in _PYTHONS:
        raise PeerUnavailableError(
            f"Concrete ML {VERSION} has no wheels for Python {sys.version_info.major}."
            f"{sys.version_info.minor}, expected 3.11 or 3.12"
        )
    name = f"concrete-ml-{VERSION}-python{sys.version_info.major}.{sys.version_info.minor}"
    directory = cache_directory() / "environments" / name
    python, ready = directory / "bin" / "python", directory / ".ready"
    if ready.is_file():
        return python
    try:
        venv.create(directory, clear=True, with_pip=True)
        subprocess.run(  # noqa: S603
            [python, "-m", "pip", "install", "--quiet", f"concrete-ml=={VERSION}"],
            check=True,
            capture_output=True,
            text=True,
        )
        ready.touch()
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines() or ["pip said nothing"]
        raise PeerUnavailableError(
            f"Concrete ML {VERSION} cannot be installed: {said[-1]}"
        ) from error
    except OSError as error:
        raise PeerUnavailableError(f"{directory} cannot be made ({error.strerror})") from error
    return python


def measure_concrete_ml(head: Head, *, calls: int, python: Path) -> list[Row]:
    """Single queries of its two ways.

    Raises:
        PeerUnavailableError: when it fails.
    """
    embeddings = head.embeddings(1)
    with tempfile.TemporaryDirectory(prefix="veilhead-concrete-ml-") as name:
        given, found = Path(name) / "head.npz", Path(name) / "measured.json"
        np.savez(given, weight=head.weight, bias=head.bias, embeddings=embeddings)
        try:
            subprocess.run(  # noqa: S603
                [python, "-W", "ignore", _SCRIPT, given, found, str(calls)],
                check=True,
                capture_output=True,
                text=True,
                cwd=name,  # it writes where it runs
                timeout=_SECONDS,
                env=_environment(),
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = str(error.stderr or "").strip().splitlines() or [str(error)]
            raise PeerUnavailableError(f"Concrete ML failed: {said[-1]}") from error
        measured = json.loads(found.read_text("utf-8"))
    return [_row(values, head, embeddings) for values in measured]


def _environment() -> dict[str, str]:
    """This process's variables, without those that would lead it to this project's packages."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | _ONE_CORE


def _row(values: dict[str, Any], head: Head, embeddings: NDArray[np.float64]) -> Row:
    logits = np.array(values["logits"])  # [batch, C], or [batch, 1]
    expected = head.logits(embeddings)
    if logits.shape[1] == 1:
        expected = expected[:, 1:] - expected[:, :1]
    times = values["encrypt_ms"], values["server_ms"], values["decrypt_ms"]
    return Row(
        subject="single",
        system=values["system"],
        parameters=values["parameters"],
        d=head.dimensions,
        classes=head.classes,
        batch=len(embeddings),
        server_ms=values["server_ms"],
        encrypt_ms=values["encrypt_ms"],
        decrypt_ms=values["decrypt_ms"],
        total_ms=added(*times),
        bytes_keys=values["bytes_keys"],
        bytes_up=values["bytes_up"],
        bytes_down=values["bytes_down"],
        max_error=float(np.abs(logits - expected).max()),
        note=values["note"],
    )
