"""A client without torch, in a virtual environment of its own: how large, and how soon an answer.

A wheel of this source tree is built and installed with the extra `onnx`; the service runs in the
environment of the benchmarks. The model is MiniLM with a random head: what is measured does not
depend on how good its answers are.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from rich.table import Table

from veilhead_benchmarks.console import wide_console
from veilhead_benchmarks.processes import ServiceProcess
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import Backbone, minilm
from veilhead_models.onnx_backbone import onnx_files
from veilhead_models.onnx_export import export_onnx
from veilhead_protocol.files import CACHE_VARIABLE
from veilhead_protocol.manifest import BackboneSection
from veilhead_service.model_store import publish

_TEXT: Final = "The patient reports acute chest pain that radiates to the left arm."
_MODEL: Final = "light"
_CLASSES: Final = 22
_REPEATS: Final = 7
_SHOWN: Final = 6

#: Must not be there: a light client that has them is none.
_HEAVY: Final = ("torch", "transformers", "safetensors", "sklearn", "fastapi", "onnx")

#: The package is imported first, so that its import can be told apart.
_FIRST_LABEL: Final = """
import time
import veilhead
imported = time.time()
import json, sys
url, model, runtime, text = sys.argv[1:]
with veilhead.Client(url, model, backbone_runtime=runtime, device="cpu") as client:
    connected = time.time()
    answer = client.classify(text)[0]
    labelled = time.time()
print(json.dumps([imported, connected, labelled, answer.label]))
"""

_PRESENT: Final = """
import importlib.util, json, sys
print(json.dumps([name for name in sys.argv[1:] if importlib.util.find_spec(name)]))
"""


@dataclass(frozen=True)
class FirstLabel:
    """The seconds from the start of a Python process to the first label, and parts of them.

    Attributes:
        runtime: `onnx`, or `onnx-fp16` with half the bytes to fetch.
        cached: whether the backbone's files were there already.
        fetched_bytes: what is fetched of the backbone.
        runs: how often it was measured.
        import_seconds: until `import veilhead` was done, the interpreter's start included.
        connect_seconds: from there until the manifest was pinned.
        label_seconds: from there to the label: fetch, load, embed, encrypt, ask, decrypt.
        total_seconds: all of it; the median over `runs`, as are its parts.
    """

    runtime: str
    cached: bool
    fetched_bytes: int
    runs: int
    import_seconds: float
    connect_seconds: float
    label_seconds: float
    total_seconds: float


@dataclass(frozen=True)
class LightClientReport:
    """What a light client takes.

    Attributes:
        installed_bytes: files that `pip install 'veilhead[onnx]'` adds to an empty environment.
        largest: the largest of the directories in it, by name, in bytes.
        import_seconds: median of a whole `python -c 'import veilhead'`.
        bare_seconds: median of a whole `python -c pass`.
        heavy: packages that must not be there, and are.
        first_labels: the seconds to the first label.
        right: whether every label was that of the plaintext model under torch.
    """

    installed_bytes: int
    largest: dict[str, int]
    import_seconds: float
    bare_seconds: float
    heavy: list[str]
    first_labels: list[FirstLabel]
    right: bool

    @property
    def passed(self) -> bool:
        """Whether the client was a light one, and right."""
        return self.right and not self.heavy


def run_light_client() -> LightClientReport:
    """Build, install, serve and measure.

    Raises:
        RuntimeError: when the sources are not there, or a command fails.
    """
    with tempfile.TemporaryDirectory(prefix="veilhead-light-") as made:
        work = Path(made)
        environment = _install(work)
        section, label = _publish(work)
        first_labels: list[FirstLabel] = []
        labels: set[str] = set()
        with ServiceProcess(work / "store", work / "service.log", workers=1) as service:
            for runtime in ("onnx", "onnx-fp16"):
                for cached in (False, True):
                    rows = []
                    for run in range(_REPEATS):
                        cache = work / f"{runtime}-{0 if cached else run}"
                        seconds, answer = _first_label(environment, service.url, runtime, cache)
                        rows.append(seconds)
                        labels.add(answer)
                    files = onnx_files(section, "fp16" if runtime == "onnx-fp16" else "fp32")
                    first_labels.append(
                        FirstLabel(
                            runtime,
                            cached,
                            0 if cached else sum(entry.bytes for entry in files),
                            len(rows),
                            *(statistics.median(column) for column in zip(*rows, strict=True)),
                        )
                    )
        return LightClientReport(
            installed_bytes=_size(environment) - _size(work / "empty"),
            largest=_largest(environment),
            import_seconds=_seconds(environment, "import veilhead"),
            bare_seconds=_seconds(environment, "pass"),
            heavy=json.loads(_inside(environment, _PRESENT, *_HEAVY)),
            first_labels=first_labels,
            right=labels == {label},
        )


def show(report: LightClientReport, out: Path) -> None:
    """Write the report as JSON, and print it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(asdict(report), indent=2) + "\n", "utf-8")
    console = wide_console()
    largest = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in report.largest.items())
    lines = [
        f"installed          {report.installed_bytes / 1e6:.0f} MB ({largest})",
        f"import veilhead    {report.import_seconds:.2f} s (bare: {report.bare_seconds:.2f} s)",
        f"must not be there  {', '.join(report.heavy) or 'nothing of it is'}",
        f"labels             {'right' if report.right else 'WRONG'}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)
    table = Table(
        "runtime", "backbone", "fetched MB", "import s", "connect s", "label s", "total s"
    )
    for row in report.first_labels:
        parts = (row.import_seconds, row.connect_seconds, row.label_seconds, row.total_seconds)
        table.add_row(
            row.runtime,
            "cached" if row.cached else "fetched",
            f"{row.fetched_bytes / 1e6:.1f}",
            *(f"{seconds:.2f}" for seconds in parts),
        )
    console.print(table)
    console.print(f"results in {out}", markup=False, highlight=False)


def _install(work: Path) -> Path:
    """An environment with the wheel and its extra `onnx`; an empty one beside it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        raise RuntimeError(f"{root} does not hold the sources: run this from a source tree")
    wheels = work / "wheels"
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, root)
    (wheel,) = wheels.glob("*.whl")
    for name in ("empty", "light"):
        _run(sys.executable, "-m", "venv", work / name)
    pip = (work / "light" / "bin" / "python", "-m", "pip", "install", "--quiet")
    _run(*pip, "--constraint", root / "constraints.txt", f"{wheel}[onnx]")
    return work / "light"


def _publish(work: Path) -> tuple[BackboneSection, str]:
    """The published model's backbone, and the text's label in plaintext, under torch."""
    directory, section = minilm()
    weight = np.random.default_rng(0).normal(size=(_CLASSES, 384)) * 4  # [C, d]
    labels = [f"class {number}" for number in range(_CLASSES)]
    head = HeadArtifact.from_weights(weight, None, labels).with_backbone(directory, section)
    head.save(work / "artifacts" / _MODEL)
    manifest, _ = export_onnx(work / "artifacts" / _MODEL, precisions=("fp32", "fp16"))
    publish(work / "artifacts" / _MODEL, work / "store")
    if manifest.backbone is None:
        raise AssertionError("it was exported")
    logits = head.logits(Backbone.load(directory, section, device="cpu").embed([_TEXT]))
    return manifest.backbone, labels[int(logits[0].argmax())]


def _first_label(
    environment: Path, url: str, runtime: str, cache: Path
) -> tuple[tuple[float, float, float, float], str]:
    """Seconds to import, to connect, to the label and in all; and the label."""
    started = time.time()
    variables = {CACHE_VARIABLE: str(cache)}
    arguments = (url, _MODEL, runtime, _TEXT)
    output = _inside(environment, _FIRST_LABEL, *arguments, variables=variables)
    imported, connected, labelled, label = json.loads(output)
    parts = (imported - started, connected - imported, labelled - connected, labelled - started)
    return parts, label


def _seconds(environment: Path, code: str) -> float:
    """Median of the seconds of a whole Python process."""
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        _inside(environment, code)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _inside(
    environment: Path, code: str, *arguments: str, variables: Mapping[str, str] | None = None
) -> str:
    """What code prints in an environment, with nothing of this one around it."""
    return _run(
        environment / "bin" / "python", "-I", "-c", code, *arguments, variables=variables or {}
    )


def _run(*command: str | Path, variables: Mapping[str, str] | None = None) -> str:
    """The output of a command; with `variables`, in an environment of these and PATH alone."""
    alone = None if variables is None else {"PATH": os.environ["PATH"], **variables}
    done = subprocess.run(  # noqa: S603
        command, env=alone, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-2000:]}")
    return done.stdout


def _size(directory: Path) -> int:
    """Bytes of the regular files below a directory."""
    files = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)


def _largest(environment: Path) -> dict[str, int]:
    (packages,) = (environment / "lib").glob("python*/site-packages")
    sizes = {
        path.name: _size(path) if path.is_dir() else path.stat().st_size
        for path in packages.iterdir()
    }
    return dict(sorted(sizes.items(), key=lambda item: item[1], reverse=True)[:_SHOWN])
