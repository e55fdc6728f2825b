"""What a service could read from its clock: `python -m veilhead_benchmarks.timing`.

Two measurements, each of the product and of what it was before. The first is the time that the
encryption of an embedding takes, by what the embedding is. The second is the time from a reply of
4,096 classes until the next request, by what the reply decrypts to. Kinds take turns in random
order; the figure is the area under the curve (AUC) of telling them apart, by one observation and by
the mean of ten, where 0.5 is chance.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest.mock import patch

import httpx2
import numpy as np
import typer
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from veilhead import AsyncClient, Prediction
from veilhead import predictions as predictions_module
from veilhead import session as session_module
from veilhead.session import Session
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import minilm
from veilhead_protocol.encoding import encode
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.wire import QueryHeader, ReplyMessage, ReplyPolynomial

_DIMENSIONS: Final = 384
_CLASSES: Final = 4096
_Array = NDArray[np.float64]
_Times = dict[str, list[float]]


def _artifact(classes: int, bias: float) -> HeadArtifact:
    """A head of which one bias decides how large logits may be."""
    generator = np.random.default_rng(1)
    return HeadArtifact.from_weights(
        generator.normal(scale=0.05, size=(classes, _DIMENSIONS)),
        np.where(np.arange(classes) == 0, bias, 0.0),
        [f"label {number}" for number in range(classes)],
        name="timed",
    )


def told_apart(usual: list[float], other: list[float], together: int) -> float:
    """The AUC of telling two kinds apart by the mean of so many observations of one."""
    count = min(len(usual), len(other)) // together
    means = [
        np.array(found[: count * together]).reshape(count, together).mean(axis=1)
        for found in (usual, other)
    ]
    return float(roc_auc_score([0] * count + [1] * count, np.concatenate(means)))


def show(title: str, times: _Times) -> None:
    """A line for each kind, against the first."""
    usual = next(iter(times.values()))
    typer.echo(title)
    for kind, found in times.items():
        aucs = (told_apart(usual, found, together) for together in (1, 10))
        one, ten = (f"{auc:.2f}" for auc in aucs)
        typer.echo(f"  {kind:28} {np.median(found) * 1e6:9.0f} us  AUC {one}, over ten {ten}")


# --- encryption -----------------------------------------------------------------------------------


def embeddings(generator: np.random.Generator) -> dict[str, _Array]:
    """A fresh embedding of every kind."""
    unit = generator.normal(size=(3, _DIMENSIONS))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return {
        "ordinary": unit[0],
        "ordinary again": unit[1],
        "zeros": np.zeros(_DIMENSIONS),
        "one value": np.eye(_DIMENSIONS)[generator.integers(_DIMENSIONS)],
        "all equal": np.full(_DIMENSIONS, _DIMENSIONS**-0.5),
        "subnormal": unit[2] * 1e-310,
        "half of it subnormal": np.r_[unit[2][:192], unit[2][192:] * 1e-312],
        "NaN, so a decoy": np.where(np.arange(_DIMENSIONS) == 7, np.nan, unit[2]),
    }


def encryption_times(manifest: Manifest, rounds: int) -> _Times:
    """Seconds of each encryption, its zero made ahead, by kind."""
    session, generator = Session(manifest), np.random.default_rng()
    times: _Times = {kind: [] for kind in embeddings(generator)}
    row = np.zeros(_DIMENSIONS)
    gc.disable()
    for number in range(rounds):
        kinds = list(embeddings(generator).items())
        for place in generator.permutation(len(kinds)):
            kind, row[:] = kinds[place]
            query = session.encrypt(row)
            session.prepare()
            started = time.perf_counter()
            _ = query.data
            if number >= 20:  # the first ones meet cold caches
                times[kind].append(time.perf_counter() - started)
        gc.collect()
    gc.enable()
    return times


@contextmanager
def encoded_as_before() -> Iterator[None]:
    """Embeddings are encoded as they are."""

    def plain(*arguments: Any) -> tuple[Any]:
        return (encode(*arguments),)

    with patch.object(session_module, "encode_evenly", plain):
        yield


# --- the time until the next request --------------------------------------------------------------


def logits_by_kind() -> dict[str, _Array]:
    """What crafted replies decrypt to: some take long to turn into scores, and to sort."""
    generator = np.random.default_rng(2)
    falling = -np.linspace(0, 740, _CLASSES)
    return {
        "all equal": np.zeros(_CLASSES),
        "exponentials subnormal": np.r_[0.0, np.full(_CLASSES - 1, -730.0)],
        "in random order": generator.permutation(falling),
    }


class Crafted(httpx2.AsyncBaseTransport):
    """A service whose replies decrypt to what it chooses, and that looks at its clock."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.logits = np.zeros(_CLASSES)
        self.answered: float | None = None
        self.gaps: list[float] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """An answer, and the time since the last one where the client could go on at once."""
        if request.method == "GET":
            return httpx2.Response(200, content=self.manifest.serialize())
        if request.method != "POST":
            return httpx2.Response(201)
        if self.answered is not None:
            self.gaps.append(time.perf_counter() - self.answered)
        reply = self._reply(await request.aread())
        self.answered = time.perf_counter()
        return httpx2.Response(200, content=reply)

    def _reply(self, query: bytes) -> bytes:
        manifest = self.manifest
        header, scales = QueryHeader.deserialize(query), manifest.scales
        modulus = manifest.parameter_set.prime
        unit = modulus / 2.0 ** (scales.reply_bits + scales.scale_bits)
        values = np.rint(self.logits / unit).astype(np.int64) % (1 << scales.reply_bits)
        polynomials, start = [], 0
        mask = np.zeros(manifest.parameter_set.poly_modulus_degree, dtype=np.uint64)
        for number in range(manifest.layout.replies):
            count = len(manifest.layout.wanted(number))
            c0 = values[start : start + count].astype(np.uint64)
            polynomials.append(ReplyPolynomial(c0, mask))
            start += count
        return ReplyMessage(
            parameters=manifest.parameter_set,
            model_digest=header.model_digest,
            key_id=header.key_id,
            layout=manifest.layout,
            reply_bits=scales.reply_bits,
            query_digest=hashlib.sha256(query).digest(),
            polynomials=tuple(polynomials),
        ).serialize()


async def next_requests(artifact: HeadArtifact, top_k: int | None, rounds: int) -> _Times:
    """Seconds between a reply to `classify` and the next one's request, by kind of reply."""
    directory, section = minilm()
    service = Crafted(artifact.with_backbone(directory, section).manifest)
    kinds, generator = logits_by_kind(), np.random.default_rng()
    times: _Times = {kind: [] for kind in kinds}
    async with AsyncClient(
        "http://127.0.0.1", "timed", backbone=directory, device="cpu", transport=service
    ) as client:
        for number in range(rounds):
            for place in generator.permutation(len(kinds)):
                kind = list(kinds)[place]
                service.logits, service.answered = kinds[kind], None
                await client.classify("cough", top_k=top_k)
                service.gaps.clear()
                await client.classify("cough", top_k=top_k)
                if number >= 3:
                    times[kind] += service.gaps
    return times


def predictions_as_before(
    logits: _Array, labels: tuple[str, ...], top_k: int | None, _function: str = "softmax"
) -> list[Prediction]:
    """Exponentials without a limit, and a sort, whatever is asked for."""
    shifted = np.exp(logits - logits.max())
    order = np.argsort(-logits, kind="stable")[:top_k]
    values = shifted / shifted.sum()
    return [Prediction(labels[index], float(values[index])) for index in order]


def answer_times(made: Callable[..., Any], top_k: int | None, rounds: int) -> _Times:
    """Seconds that predictions take, by kind of logits."""
    kinds, labels = logits_by_kind(), tuple(f"label {number}" for number in range(_CLASSES))
    times: _Times = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, logits in kinds.items():
            started = time.perf_counter()
            made(logits, labels, top_k)
            times[kind].append(time.perf_counter() - started)
    return times


def main(rounds: int = 1000) -> None:
    """Measure, and print. Nothing else should run on the machine."""
    manifest = _artifact(22, 1.0).manifest
    with encoded_as_before():
        show("encryption, values encoded as they are", encryption_times(manifest, rounds))
    show("encryption", encryption_times(manifest, rounds))
    wide = _artifact(_CLASSES, 800.0)
    few = max(20, rounds // 10)
    for top_k in (1, None):
        before = answer_times(predictions_as_before, top_k, rounds)
        show(f"predictions as they were, top_k={top_k}", before)
        now = answer_times(predictions_module.predictions, top_k, rounds)
        show(f"predictions, top_k={top_k}", now)
    with patch.object(predictions_module, "predictions", predictions_as_before):
        show(
            "until the next request, predictions as they were",
            asyncio.run(next_requests(wide, 1, few)),
        )
    show("until the next request", asyncio.run(next_requests(wide, 1, few)))


if __name__ == "__main__":
    typer.run(main)
