"""What sizes and timing tell an observer of the network, or the service itself.

Under TLS an observer sees how many bytes go each way and when. The lengths of requests follow from
the model and from the number of texts, and from nothing else: not from a text, an embedding or an
answer. The time between requests holds the time that the backbone took, which grows with the text.

TenSEAL compresses what it sends, so that no two queries of a naive service are of one length; these
lengths are those of random numbers and tell nothing of what is in them.

`Client(pad_batches=True)` sends decoys until the number of texts is a power of two. Against timing
`Client(embed_first=True)` leaves one gap for a whole call; `Client.embed` and, some other time,
`Client.logits` leave none. `veilhead_benchmarks.timing` measures what the rest of the client takes.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Final

import numpy as np
from sklearn.metrics import roc_auc_score

from veilhead.session import Session
from veilhead_benchmarks.attacks import naive
from veilhead_benchmarks.attacks.data import backbone
from veilhead_benchmarks.attacks.pair import Pair, random_head
from veilhead_benchmarks.attacks.results import AttackResult, above, at_chance, at_most
from veilhead_models.artifact import HeadArtifact
from veilhead_protocol.wire import QueryMessage, ReplyMessage

#: Numbers of texts in one call that the observer tells apart.
_MOST_TEXTS: Final = 256

#: What the observer sees of one call: bytes of every request and reply, in order.
Sight = tuple[tuple[int, int], ...]


def sight(artifact: HeadArtifact, texts: int, *, padded: bool) -> Sight:
    """The sizes on the wire of a call with so many texts."""
    manifest = artifact.manifest
    count = 1 << (texts - 1).bit_length() if padded else texts
    return tuple(
        (
            QueryMessage.size(manifest.parameter_set, manifest.layout_of(size)),
            ReplyMessage.size(manifest.layout_of(size), manifest.head.reply_bits),
        )
        for size in Session(manifest).plan(count)
    )


def share_identified(sights: Iterable[Hashable]) -> float:
    """How often the best guess from what is seen is right, every secret being as likely."""
    seen = Counter(sights)
    return len(seen) / seen.total()


def _lengths_told(ask: Callable[[str], object], rounds: int) -> float:
    """The AUC of telling a text of 200 words from one of 5 by the time that passes."""
    short, long = "word " * 5, "word " * 200
    for text in (short, long):
        ask(text)
    seconds, truth = [], []
    for _ in range(rounds):
        for is_long, text in enumerate((short, long)):
            started = time.perf_counter()
            ask(text)
            seconds.append(time.perf_counter() - started)
            truth.append(is_long)
    return float(roc_auc_score(truth, seconds))


def naive_lengths(rounds: int) -> AttackResult:
    """Telling an embedding of zeros from another by the length of a naive service's query."""
    kinds = np.zeros(384), np.eye(384)[0]
    lengths = [len(naive.query(kind)) for _ in range(rounds) for kind in kinds]
    told = float(roc_auc_score([0, 1] * rounds, lengths))
    result = AttackResult(
        "traffic", "tenseal-mm", "an embedding of zeros, from lengths",
        "AUC", told, 2 * rounds, chance=0.5,
    )  # fmt: skip
    # The deviation of the area where nothing can be told, by Mann and Whitney.
    return at_chance(result, math.sqrt((2 * rounds + 1) / (12 * rounds**2)))


def run(*, short: bool) -> list[AttackResult]:
    """Sizes of calls of 1 to 256 texts, of eight heads, and times of the backbone."""
    heads = [
        random_head(classes, dimensions) for classes in (2, 4, 20, 77) for dimensions in (384, 768)
    ]

    def result(target: str, metric: str, value: float, samples: int) -> AttackResult:
        return AttackResult("traffic", "veilhead", target, metric, value, samples)

    numbers = range(1, _MOST_TEXTS + 1)
    counts = "number of texts, 1 to 256, from sizes"
    guessed = "share guessed rightly"
    plain = share_identified(sight(heads[2], texts, padded=False) for texts in numbers)
    padded = share_identified(sight(heads[2], texts, padded=True) for texts in numbers)
    models = share_identified(sight(head, 1, padded=False) for head in heads)
    pair = Pair.of(heads[0])
    rows = np.eye(384)
    asked_rows = 5 if short else 50
    lengths = {len(pair.session.encrypt(row).data) for row in rows[:asked_rows]}
    found = [
        above(result(counts, guessed, plain, _MOST_TEXTS), 0.5),
        at_most(
            result(f"{counts}, padded", guessed, padded, _MOST_TEXTS),
            9 / _MOST_TEXTS,  # nine powers of two
        ),
        result("one of eight models, from sizes", guessed, models, len(heads)),
        at_most(
            result(
                "the embedding, from sizes",
                "lengths of queries",
                len(lengths),
                asked_rows,
            ),
            1,
        ),
        naive_lengths(asked_rows),
    ]
    if not short:
        model = backbone()
        rounds = 20
        told = "AUC of 200 words against 5, from time"
        asked = _lengths_told(lambda text: pair.logits(model.embed([text])), rounds)
        embedded = {text: model.embed([text]) for text in ("word " * 5, "word " * 200)}
        ahead = _lengths_told(lambda text: pair.logits(embedded[text]), rounds)
        found += [
            above(result("length of the text", told, asked, 2 * rounds), 0.75),
            result("length of the text, embedded before", told, ahead, 2 * rounds),
        ]
    return found
