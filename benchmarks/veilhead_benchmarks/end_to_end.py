"""From text to label over HTTP: the client against the twin of the service without privacy.

Both embed the same texts with the same backbone, on the CPU of this process, and both services run
in processes of their own on the same machine. They take turns, one round each, the first one
changing: what disturbs the machine disturbs both. Of each case the whole call is timed, and for the
encrypted way also what its queries say of themselves (encryption, evaluation, decryption). Every
turn begins after a short rest, so that what one way leaves to be done falls upon neither.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from veilhead import Client, QueryTrace
from veilhead_benchmarks.heads import Head
from veilhead_benchmarks.plaintext_twin import TwinClient, TwinProcess
from veilhead_benchmarks.processes import ServiceProcess
from veilhead_benchmarks.rows import Row
from veilhead_models.backbone import Backbone
from veilhead_protocol.manifest import BackboneSection
from veilhead_service.model_store import publish

_PARAMETERS = "standard"
_NAME = "benchmark"
_CHECKED = 8

#: Before every turn. Veilhead encrypts zeros for the next query once an answer is out.
_REST_SECONDS = 0.02


@dataclass(frozen=True)
class Case:
    """So many texts in one call, for a head of so many classes, so many times each way."""

    texts: int
    classes: int
    rounds: int


def measure_end_to_end(
    cases: Sequence[Case], texts: Sequence[str], directory: Path, section: BackboneSection
) -> list[Row]:
    """Two rows for every case.

    Args:
        cases: what to ask for.
        texts: what to classify.
        directory: the backbone's files.
        section: what the manifest says of it.

    Raises:
        BackboneError: when the backbone cannot be loaded.
        RuntimeError: when the two ways answer differently.
    """
    backbone = Backbone.load(directory, section, device="cpu")
    rows = []
    for classes in dict.fromkeys(case.classes for case in cases):
        head = Head.random(classes, backbone.dimensions)
        with tempfile.TemporaryDirectory(prefix="veilhead-end-to-end-") as name:
            work = Path(name)
            artifact = head.artifact(_PARAMETERS).with_backbone(directory, section)
            artifact.save(work / _NAME)
            publish(work / _NAME, work / "store")
            traces: list[QueryTrace] = []
            with (
                ServiceProcess(work / "store", work / "service.log") as service,
                TwinProcess(head, work) as twin,
                Client(
                    service.url,
                    _NAME,
                    backbone=directory,
                    backbone_runtime="torch",
                    device="cpu",
                    on_query=traces.append,
                ) as client,
                TwinClient(twin.url, backbone, classes) as plaintext,
            ):
                pair = _Pair(head, client, plaintext, traces, texts)
                for case in cases:
                    if case.classes == classes:
                        rows += pair.measure(case)
    return rows


@dataclass(frozen=True, eq=False)
class _Pair:
    """Both ways to classify, ready."""

    head: Head
    client: Client
    plaintext: TwinClient
    traces: list[QueryTrace]
    texts: Sequence[str]

    def measure(self, case: Case) -> list[Row]:
        """The rows of one case."""
        batches = [self._batch(number, case.texts) for number in range(case.rounds)]
        error = self._check(batches[0][:_CHECKED])  # warms both up, too
        encrypted: list[float] = []
        plain: list[float] = []
        parts: list[dict[str, float]] = []
        for number, batch in enumerate(batches):
            self.traces.clear()

            def encrypt_all(batch: Sequence[str] = batch) -> None:
                encrypted.append(_milliseconds(lambda: self.client.classify(batch)))

            def ask_plainly(batch: Sequence[str] = batch) -> None:
                plain.append(_milliseconds(lambda: self.plaintext.classify(batch)))

            turns = (encrypt_all, ask_plainly)
            for turn in turns if number % 2 == 0 else turns[::-1]:
                time.sleep(_REST_SECONDS)
                turn()
            parts.append(_parts(self.traces))
        ratio = statistics.median(
            mine / other for mine, other in zip(encrypted, plain, strict=True)
        )
        median = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
        return [
            Row(
                subject="end-to-end",
                system="veilhead",
                parameters=_PARAMETERS,
                d=self.head.dimensions,
                classes=case.classes,
                batch=case.texts,
                server_ms=median["evaluate"],
                encrypt_ms=median["encrypt"],
                decrypt_ms=median["decrypt"],
                total_ms=statistics.median(encrypted),
                bytes_keys=round(median["key bytes"]),
                bytes_up=round(median["query bytes"]),
                bytes_down=round(median["reply bytes"]),
                max_error=error,
                note=f"{ratio:.3f} times plaintext (median of {case.rounds} paired rounds); "
                f"round trips {median['round trip']:.1f} ms; parts of a long call overlap",
            ),
            Row(
                subject="end-to-end",
                system="plaintext",
                parameters="float32 over HTTP",
                d=self.head.dimensions,
                classes=case.classes,
                batch=case.texts,
                total_ms=statistics.median(plain),
                bytes_keys=0,
                bytes_up=4 * self.head.dimensions * case.texts,
                bytes_down=4 * case.classes * case.texts,
                max_error=0.0,
                note="the same backbone and HTTP server, asked through httpx2",
            ),
        ]

    def _batch(self, number: int, size: int) -> list[str]:
        """The texts of a round: others in each, around the split again where it is short."""
        return [self.texts[(number * size + row) % len(self.texts)] for row in range(size)]

    def _check(self, texts: Sequence[str]) -> float:
        """The largest distance of encrypted from plaintext logits."""
        embeddings = self.client.embed(texts)
        expected = self.plaintext.classify(texts)
        error = float(np.abs(self.client.logits(embeddings) - expected).max())
        bound = self.client.manifest.head.error_bound + 1e-4  # the twin computes in float32
        if not error <= bound:
            raise RuntimeError(f"the two ways differ by {error:.3g}, expected at most {bound:.3g}")
        self.client.classify(list(texts))
        return error


def _milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def _parts(traces: Sequence[QueryTrace]) -> dict[str, float]:
    """Milliseconds and bytes of a call's queries, added up."""
    return {
        "encrypt": 1e3 * sum(trace.encrypt_seconds for trace in traces),
        "round trip": 1e3 * sum(trace.round_trip_seconds for trace in traces),
        "evaluate": 1e3 * sum(trace.evaluate_seconds for trace in traces),
        "decrypt": 1e3 * sum(trace.decrypt_seconds for trace in traces),
        # Requests of several texts have a key each; single ones share it.
        "key bytes": sum(trace.key_bytes for trace in traces if trace.texts > 1)
        or max(trace.key_bytes for trace in traces),
        "query bytes": sum(trace.query_bytes for trace in traces),
        "reply bytes": sum(trace.reply_bytes for trace in traces),
    }
