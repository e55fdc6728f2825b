"""The demo: a real model, a real service in a process of its own, and a whole held-out split.

Every phrase of the split is classified over HTTP, one text a request, and compared with what the
same head says in plaintext. The report's figures are of such single requests.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from veilhead import Client, Prediction, QueryTrace
from veilhead.predictions import predictions
from veilhead_benchmarks.console import wide_console
from veilhead_models.artifact import HeadArtifact
from veilhead_models.datasets import load_dataset
from veilhead_protocol.wire import QUERY_HEADER_BYTES

DATASET: Final = "icd10-chapters"
REPORT_FILE: Final = Path("demo-report.json")

_SHOWN_ROWS: Final = 20
_SHOWN_SEED: Final = 20
_CELL: Final = 32
_SHOWN_BYTES: Final = 192
_START_SECONDS: Final = 120.0


@dataclass(frozen=True)
class Measured:
    """One classified phrase."""

    text: str
    truth: int
    encrypted: NDArray[np.float64]  # logits [C]
    plaintext: NDArray[np.float64]  # logits [C]
    embed_seconds: float
    trace: QueryTrace


class _Tap(httpx2.AsyncHTTPTransport):
    """The ordinary transport, which remembers the last query that went out."""

    last_query = b""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path.endswith("/infer"):
            self.last_query = await request.aread()
        return await super().handle_async_request(request)


def run_demo(work: Path) -> bool:
    """Run the demo below the directory `work`; True when the encrypted path kept its promises."""
    console = wide_console()
    artifact_directory, store = work / "artifacts" / DATASET, work / "store"
    _command("train", DATASET, "--out", str(artifact_directory))
    _command("publish", str(artifact_directory), "--store", str(store))
    artifact = HeadArtifact.load(artifact_directory)
    test = load_dataset(DATASET).test
    traces: list[QueryTrace] = []
    tap = _Tap()
    with (
        _service(store) as url,
        Client(url, DATASET, on_query=traces.append, transport=tap) as client,
    ):
        console.print(f"\nclassifying {len(test.texts)} held-out phrases through {url}\n")
        client.classify(test.texts[0])  # fetches and loads the backbone
        measured = []
        for text, truth in track(
            list(zip(test.texts, test.targets, strict=True)),
            description="encrypted",
            console=console,
            disable=not console.is_terminal,
        ):
            started = time.perf_counter()
            embedding = client.embed([text])  # [1, d]
            embedded = time.perf_counter()
            encrypted = client.logits(embedding)[0]
            measured.append(
                Measured(
                    text=text,
                    truth=int(truth),
                    encrypted=encrypted,
                    plaintext=artifact.logits(embedding)[0],
                    embed_seconds=embedded - started,
                    trace=traces[-1],
                )
            )
        bound = client.manifest.head.error_bound
    report = summarise(measured, bound)
    _show(console, measured, artifact.labels)
    _print_summary(console, report, bound, tap.last_query)
    REPORT_FILE.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    kept: bool = report["labels_agree"] and report["max_logit_error"] <= bound
    if not kept:
        console.print("FAILED: the encrypted path differs from the plaintext one", style="bold red")
    return kept


def summarise(measured: list[Measured], bound: float) -> dict[str, Any]:
    """The report of the measured phrases.

    `labels_agree` asks for equal labels wherever the two best plaintext logits differ by more than
    twice the error bound; nearer ones may swap.
    """
    encrypted = np.stack([row.encrypted for row in measured])  # [rows, C]
    plaintext = np.stack([row.plaintext for row in measured])
    truth = np.array([row.truth for row in measured])
    best = np.sort(plaintext, axis=1)
    clear = best[:, -1] - best[:, -2] > 2 * bound
    same = encrypted.argmax(axis=1) == plaintext.argmax(axis=1)

    def median(values: Iterator[float]) -> float:
        return round(statistics.median(values) * 1e3, 3)

    return {
        "texts": len(measured),
        "accuracy": {
            "plaintext": float((plaintext.argmax(axis=1) == truth).mean()),
            "encrypted": float((encrypted.argmax(axis=1) == truth).mean()),
        },
        "labels_agree": bool((same | ~clear).all()),
        "max_logit_error": float(np.abs(encrypted - plaintext).max()),
        "milliseconds": {
            "embed": median(row.embed_seconds for row in measured),
            "encrypt": median(row.trace.encrypt_seconds for row in measured),
            "round_trip": median(row.trace.round_trip_seconds for row in measured),
            "evaluate": median(row.trace.evaluate_seconds for row in measured),
            "decrypt": median(row.trace.decrypt_seconds for row in measured),
        },
        "bytes": {
            "key": measured[0].trace.key_bytes,
            "query": measured[0].trace.query_bytes,
            "reply": measured[0].trace.reply_bytes,
        },
    }


def _show(console: Console, measured: list[Measured], labels: tuple[str, ...]) -> None:
    """Twenty rows, chosen by a fixed seed."""
    chosen = np.random.default_rng(_SHOWN_SEED).choice(
        len(measured), min(_SHOWN_ROWS, len(measured)), replace=False
    )
    table = Table("phrase", "true label", "encrypted answer", "plaintext answer", "score")
    for index in sorted(chosen):
        row = measured[index]
        (answer,) = predictions(row.encrypted, labels, 1)
        (plain,) = predictions(row.plaintext, labels, 1)
        cells = (row.text, labels[row.truth], answer.label, plain.label)
        table.add_row(*(_short(cell) for cell in cells), _score(answer))
    console.print(table, markup=False)


def _short(text: str) -> str:
    return text if len(text) <= _CELL else text[: _CELL - 3] + "..."


def _score(prediction: Prediction) -> str:
    return f"{prediction.score:.3f}"


def _print_summary(console: Console, report: dict[str, Any], bound: float, query: bytes) -> None:
    accuracy, stages, sizes = report["accuracy"], report["milliseconds"], report["bytes"]
    lines = [
        f"texts              {report['texts']}",
        "accuracy           "
        + ", ".join(f"{path} {value:.4f}" for path, value in accuracy.items()),
        f"labels agree       {report['labels_agree']}",
        f"logit error        at most {report['max_logit_error']:.2e}, bound {bound:.2e}",
        "median ms          "
        + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in stages.items()),
        "bytes              " + ", ".join(f"{name} {value}" for name, value in sizes.items()),
        "what the service received of the last phrase:",
        f"    ({QUERY_HEADER_BYTES} bytes of header, then ciphertext; the reply repeats its hash)",
    ]
    lines += [
        f"    {offset:04x}  {query[offset : offset + 16].hex(' ')}"
        for offset in range(0, _SHOWN_BYTES, 16)
    ]
    console.print("\n".join(lines), markup=False, highlight=False)


def _command(*arguments: str) -> None:
    """Run `veilhead-server` as a user would.

    Raises:
        subprocess.CalledProcessError: when it fails; it has said why.
    """
    subprocess.run(  # noqa: S603
        [sys.executable, "-m", "veilhead_service", *arguments], check=True
    )


@contextmanager
def _service(store: Path) -> Iterator[str]:
    """The URL of a service that runs as its own process while the block does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "veilhead_service", "run", "--store", str(store)]
    command += ["--insecure-no-tenants"]  # on loopback, for as long as the demo runs
    process = subprocess.Popen(  # noqa: S603
        [*command, "--port", str(port)], env=os.environ | {"NO_COLOR": "1"}
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the service did not come up; its own message is above")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz", trust_env=False).is_success
    except httpx2.TransportError:
        return False
