"""Heads that were trained on real texts: the encrypted answer against the plaintext one.

A sample of each data set, so that the run stays short: what is judged is the distance between the
two answers, not how good the head is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veilhead_benchmarks.heads import Head
from veilhead_benchmarks.queries import VeilheadExchange
from veilhead_benchmarks.rows import Row
from veilhead_models.backbone import Backbone
from veilhead_models.datasets import Dataset, Split
from veilhead_models.training import train_head

_SEED: Final = 1


def measure_fidelity(
    dataset: Dataset,
    backbone: Backbone,
    parameters: Sequence[str],
    *,
    rows_per_label: int,
    test_rows: int,
) -> list[Row]:
    """One row for each parameter set.

    Raises:
        DatasetError: when a label has no row to be trained on.
        RuntimeError: when a label differs where the plaintext margin is clear.
    """
    dataset = sampled(dataset, rows_per_label, test_rows)
    trained = train_head(dataset, backbone)
    embeddings = backbone.embed(dataset.test.texts)
    head = Head(trained.weight, trained.bias)
    return [_compared(dataset, head, embeddings, chosen) for chosen in parameters]


def sampled(dataset: Dataset, rows_per_label: int, test_rows: int) -> Dataset:
    """At most so many training rows of each label and so many test rows, by a fixed seed."""
    generator = np.random.default_rng(_SEED)
    taken: Counter[int] = Counter()
    train = []
    for index in generator.permutation(len(dataset.train.texts)):
        label = int(dataset.train.targets[index])
        if taken[label] < rows_per_label:
            taken[label] += 1
            train.append(int(index))
    test = generator.permutation(len(dataset.test.texts))[:test_rows]
    return Dataset(
        name=dataset.name,
        train=_chosen(dataset.train, sorted(train)),
        test=_chosen(dataset.test, sorted(map(int, test))),
        labels=dataset.labels,
        source=dataset.source,
        license=dataset.license,
    )


def _chosen(split: Split, indices: list[int]) -> Split:
    return Split(tuple(split.texts[index] for index in indices), split.targets[indices])


def _compared(
    dataset: Dataset, head: Head, embeddings: NDArray[np.float64], parameters: str
) -> Row:
    exchange = VeilheadExchange(head, parameters)
    requests = exchange.encrypt(embeddings)
    encrypted = exchange.decrypt(exchange.evaluate(requests))
    plain = head.logits(embeddings)
    best = np.sort(plain, axis=1)
    clear = best[:, -1] - best[:, -2] > 2 * exchange.artifact.manifest.head.error_bound
    same = encrypted.argmax(axis=1) == plain.argmax(axis=1)
    if not (same | ~clear).all():
        raise RuntimeError(f"labels of {dataset.name} differ where the margin is clear")
    truth = dataset.test.targets
    return Row(
        subject=f"fidelity/{dataset.name}",
        system="veilhead",
        parameters=parameters,
        d=head.dimensions,
        classes=head.classes,
        batch=len(embeddings),
        max_error=float(np.abs(encrypted - plain).max()),
        note=f"{int(same.sum())} of {len(same)} labels equal, {int((~clear).sum())} within the "
        f"margin; accuracy {float((plain.argmax(axis=1) == truth).mean()):.4f} in plaintext, "
        f"{float((encrypted.argmax(axis=1) == truth).mean()):.4f} encrypted",
    )
