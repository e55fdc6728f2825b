"""Inversion: which text is this? From an embedding, a noised embedding, and a query's bytes.

Two attackers. *Retrieval* has a list of candidate texts and names the nearest. The *decoder* learns
from other texts which words an embedding speaks of (a linear map from the vector to the words).
Both are given a vector for each text: its embedding, its embedding with noise, or the residues that
cross the wire. Decoder and retrieval of residues go through a map that is learnt from pairs of
query and embedding, as a service with its own texts could make them.

A naive service on TenSEAL is asked the same: its wire is encrypted too, and tells as little.

The same attackers are given the residues of the query *before encryption*, through the same pipe:
were they blind to residues, they would fail there too.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from veilhead.session import Session
from veilhead_benchmarks.attacks import naive
from veilhead_benchmarks.attacks.data import embedded
from veilhead_benchmarks.attacks.results import AttackResult, above, at_chance, at_chance_count
from veilhead_models.artifact import HeadArtifact
from veilhead_protocol import seal_io
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.scales import project
from veilhead_protocol.wire import QueryMessage

#: Noise of each value of a noised embedding, relative to the root mean square of the values.
NOISE: Final = (1.0, 4.0, 16.0)

#: Words that the decoder looks for.
WORDS: Final = 100

_RIDGE: Final = 1.0

_Array = NDArray[np.float64]


def bag_of_words(texts: Sequence[str], count: int) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Which of the `count` commonest words of four letters or more a text has: [texts, count]."""
    found = [set(re.findall(r"[a-z]{4,}", text.lower())) for text in texts]
    common = Counter(word for words in found for word in sorted(words)).most_common(count)
    words = tuple(word for word, _ in common)
    return np.array([[word in text for word in words] for text in found]), words


def linear_map(features: _Array, values: _Array) -> tuple[_Array, _Array]:
    """Ridge regression of values [rows, k] on features [rows, f]: matrix [f, k], offset [k].

    In the dual, as features may be more than rows; the penalty follows their size.
    """
    mean, offset = features.mean(axis=0), values.mean(axis=0)
    centred = features - mean
    kernel = centred @ centred.T  # [rows, rows]
    kernel[np.diag_indices_from(kernel)] += _RIDGE * np.trace(kernel) / len(kernel) / 10
    matrix = centred.T @ np.linalg.solve(kernel, values - offset)  # [f, k]
    return matrix, offset - mean @ matrix


def word_auc(scores: _Array, truths: NDArray[np.bool_]) -> float:
    """Mean over words of the area under the curve: scores and truths are [texts, words].

    Every word must be in some of the texts, and not in all.
    """
    return _mean_area(_ranks(scores), truths)


def word_auc_deviation(scores: _Array, truths: NDArray[np.bool_], seed: int = 4) -> float:
    """Standard deviation of `word_auc` when scores belong to other texts: by permutation."""
    generator = np.random.default_rng(seed)
    ranks = _ranks(scores)
    return float(
        np.std([_mean_area(ranks[generator.permutation(len(ranks))], truths) for _ in range(200)])
    )


def _ranks(scores: _Array) -> _Array:
    from scipy.stats import rankdata

    ranks: _Array = rankdata(scores, axis=0)
    return ranks


def _mean_area(ranks: _Array, truths: NDArray[np.bool_]) -> float:
    positive = truths.sum(axis=0)  # [words]
    mean = (ranks * truths).sum(axis=0) / positive
    return float(((mean - (positive + 1) / 2) / (len(truths) - positive)).mean())


def retrieved(vectors: _Array, candidates: _Array) -> float:
    """Share of vectors [texts, d] whose nearest candidate, by angle, is the one in their place."""
    lengths = np.linalg.norm(candidates, axis=1, keepdims=True)
    nearest = (vectors @ (candidates / np.maximum(lengths, 1e-12)).T).argmax(axis=1)
    return float((nearest == np.arange(len(vectors))).mean())


def query_features(manifest: Manifest, embeddings: _Array) -> _Array:
    """The coefficients of what crosses the wire for each embedding: [texts, residues].

    Residues by coefficient are a public transform of the bytes, and the form in which a query that
    was not encrypted would be plain to see. They are scaled to -1 ... 1.
    """
    session = Session(manifest)
    features = []
    for row in embeddings:
        message = QueryMessage.deserialize(
            session.encrypt(row).data, manifest.parameter_set, manifest.layout
        )
        pieces = [_coefficients(manifest, piece.c0) for piece in message.polynomials]
        features.append(np.concatenate(pieces))
    return np.stack(features)


def unencrypted_features(manifest: Manifest, embeddings: _Array) -> _Array:
    """The same of the queries before encryption, scaled and rounded as they are: [texts, ...].

    Noise of the size of an encryption's would be far below the last digit.
    """
    scale = 2.0**manifest.scales.query_scale_bits
    prime = manifest.parameter_set.prime
    features = []
    for row in project(embeddings, manifest.embedding.scale):
        pieces = []
        for piece in manifest.layout.pack_embeddings(row[np.newaxis]):
            whole = [int(value) for value in np.rint(piece * scale)]
            pieces.append(_centred(np.array([v % prime for v in whole]), prime))
        features.append(np.concatenate(pieces))
    return np.stack(features)


def _coefficients(manifest: Manifest, c0: NDArray[np.uint64]) -> _Array:
    """c0 [N] as it was sent, by coefficient and from -1 to 1: [N]."""
    seal = seal_io.runtime(manifest.parameter_set)
    ciphertext = seal_io.load_ciphertext(seal, np.stack([c0, c0]), scale_bits=0)
    seal.evaluator.transform_from_ntt_inplace(ciphertext)
    residues = seal_io.save_ciphertext(seal, ciphertext)[0]
    return _centred(residues, manifest.parameter_set.prime)


def _centred(residues: NDArray[np.integer[Any]], prime: int) -> _Array:
    values = residues.astype(np.float64) / prime
    centred: _Array = 2 * np.where(values > 0.5, values - 1, values)
    return centred


def noised(embeddings: _Array, ratio: float, seed: int) -> _Array:
    """Embeddings with normal noise of `ratio` times their root mean square in every value."""
    deviation = ratio * math.sqrt(float((embeddings**2).mean()))
    noise = np.random.default_rng(seed).normal(scale=deviation, size=embeddings.shape)
    found: _Array = embeddings + noise
    return found


def invert(
    texts: Sequence[str],
    embeddings: _Array,
    *,
    train_rows: int,
    parameters: str = "standard",
    naive_service: bool = True,
) -> list[AttackResult]:
    """Both attackers on every kind of vector.

    Args:
        texts: distinct texts; the first `train_rows` are the attacker's own.
        embeddings: [texts, d].
        train_rows: texts that the maps are learnt from.
        parameters: the parameter set of the queries.
        naive_service: whether queries of a naive service on TenSEAL are among the vectors.
    """
    words, _ = bag_of_words(texts, WORDS)
    manifest = HeadArtifact.from_weights(
        np.ones((2, embeddings.shape[1])), None, ("a", "b"), name="attacked", parameters=parameters
    ).manifest
    wires = {f"query bytes ({parameters})": "veilhead"}
    kinds = {
        "embedding": embeddings,
        **{
            f"embedding, noise {ratio:g} of its size": noised(embeddings, ratio, seed=1)
            for ratio in NOISE
        },
        "query before encryption": unencrypted_features(manifest, embeddings),
        f"query bytes ({parameters})": query_features(manifest, embeddings),
    }
    if naive_service:
        wires["query bytes (TenSEAL mm)"] = "tenseal-mm"
        kinds["query bytes (TenSEAL mm)"] = naive.query_features(embeddings)
    known, attacked = slice(0, train_rows), slice(train_rows, len(texts))
    count = len(texts) - train_rows
    # What no attacked text says, or every one, tells nothing.
    told = words[attacked].any(axis=0) & ~words[attacked].all(axis=0)
    words = words[:, told]
    truths = words[attacked]
    results = []
    for target, vectors in kinds.items():
        matrix, offset = linear_map(vectors[known], words[known].astype(np.float64))
        scores = vectors[attacked] @ matrix + offset  # [attacked, words]
        auc = word_auc(scores, truths)
        if vectors.shape == embeddings.shape:
            guesses = vectors[attacked]
        else:
            matrix, offset = linear_map(vectors[known], embeddings[known])
            guesses = vectors[attacked] @ matrix + offset
        found = retrieved(guesses, embeddings[attacked])

        def result(metric: str, value: float, chance: float, target: str = target) -> AttackResult:
            return AttackResult(
                attack="inversion",
                system=wires.get(target, "plaintext"),
                target=target,
                metric=metric,
                value=value,
                samples=count,
                chance=chance,
            )

        decoded = result("decoder: mean AUC of words", auc, 0.5)
        named = result(f"retrieval among {count}: top 1", found, 1 / count)
        if target in wires:
            decoded = at_chance(decoded, word_auc_deviation(scores, truths))
            named = at_chance_count(named)
        elif target in ("embedding", "query before encryption"):
            decoded, named = above(decoded, 0.7), above(named, 0.5)
        results += [decoded, named]
    return results


def run(*, short: bool) -> list[AttackResult]:
    """On phrases of icd10-chapters: 1,500 are the attacker's own, 1,000 are attacked."""
    data = embedded("icd10-chapters")
    embeddings, _, texts = data.pool
    own, attacked = (300, 150) if short else (1500, 1000)
    chosen = np.random.default_rng(5).permutation(len(texts))[: own + attacked]
    return invert([texts[row] for row in chosen], embeddings[chosen], train_rows=own)
