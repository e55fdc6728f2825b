"""Adversarial text: how few changed characters turn an answer, and what training on typos helps.

Word importance as in TextBugger (Li et al., NDSS 2019): the words whose removal lowers the right
class's margin most are edited first, each by the one typo of several (swapped, dropped, doubled or
replaced letters) that lowers it most. The attacker may ask for logits as often as it likes: here it
is the user, who has the backbone on its own machine, and encryption changes nothing about that. The
service sees no text and cannot filter one.

The defence is a head that was also trained on texts with random typos.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veilhead_benchmarks.attacks.data import backbone, embedded
from veilhead_benchmarks.attacks.results import AttackResult, at_most
from veilhead_models.training import fit_head

#: Edited words for which accuracy is reported.
BUDGETS: Final = (0, 1, 2, 3)

#: Typos that are tried on a word.
TYPOS: Final = 6

_Array = NDArray[np.float64]

#: Embeds texts: [texts, d].
Embed = Callable[[Sequence[str]], _Array]


@dataclass(frozen=True, eq=False)
class Head:
    """Weight [C, d] and bias [C]."""

    weight: _Array
    bias: _Array

    def margins(self, embeddings: _Array, targets: NDArray[np.intp]) -> _Array:
        """Logit of the right class above the best other one: [rows]; negative when wrong."""
        logits = embeddings @ self.weight.T + self.bias  # [rows, C]
        rows = np.arange(len(targets))
        own = logits[rows, targets].copy()
        logits[rows, targets] = -np.inf
        found: _Array = own - logits.max(axis=1)
        return found


def typo(word: str, generator: random.Random) -> str:
    """The word with one slip: letters swapped, one dropped, doubled or replaced."""
    if len(word) < 2:
        return word + generator.choice(string.ascii_lowercase)
    place = generator.randrange(len(word) - 1)
    return generator.choice(
        [
            word[:place] + word[place + 1] + word[place] + word[place + 2 :],
            word[:place] + word[place + 1 :],
            word[: place + 1] + word[place:],
            word[:place] + generator.choice(string.ascii_lowercase) + word[place + 1 :],
        ]
    )


def with_typos(text: str, count: int, generator: random.Random) -> str:
    """The text with typos in so many of its words, or in all where it has fewer."""
    words = text.split()
    for place in generator.sample(range(len(words)), min(count, len(words))):
        words[place] = typo(words[place], generator)
    return " ".join(words)


def attack(
    texts: Sequence[str],
    targets: NDArray[np.intp],
    head: Head,
    embed: Embed,
    *,
    budget: int,
    seed: int,
) -> list[_Array]:
    """Margins [texts] after 0, 1, ... `budget` edited words; they never rise."""
    generator = random.Random(seed)  # noqa: S311  (not a secret)
    margins = head.margins(embed(texts), targets)
    history = [margins.copy()]
    # Importance: margins without each word.
    owners, without = [], []
    for row, text in enumerate(texts):
        words = text.split()
        for place in range(len(words)):
            owners.append(row)
            without.append(" ".join(words[:place] + words[place + 1 :]))
    importance = head.margins(embed(without), targets[owners])
    order: list[list[int]] = []
    start = 0
    for text in texts:
        count = len(text.split())
        order.append(np.argsort(importance[start : start + count], kind="stable").tolist())
        start += count
    current = [text.split() for text in texts]
    for step in range(budget):
        owners, tried = [], []
        for row, words in enumerate(current):
            if step >= len(words):
                continue
            place = order[row][step]
            for _ in range(TYPOS):
                owners.append(row)
                tried.append([*words[:place], typo(words[place], generator), *words[place + 1 :]])
        found = head.margins(embed([" ".join(words) for words in tried]), targets[owners])
        for row, words, margin in zip(owners, tried, found.tolist(), strict=True):
            if margin < margins[row]:
                margins[row], current[row] = margin, words
        history.append(margins.copy())
    return history


def compare(
    train: tuple[Sequence[str], NDArray[np.intp]],
    attacked: tuple[Sequence[str], NDArray[np.intp]],
    classes: int,
    embed: Embed,
) -> list[AttackResult]:
    """Accuracy by budget, of a head and of one that was trained on typos as well."""
    texts, targets = train
    generator = random.Random(8)  # noqa: S311
    clean = embed(texts)
    bent = embed([with_typos(text, generator.randint(1, 3), generator) for text in texts])
    heads = {
        "head": Head(*fit_head(clean, targets, classes)),
        "head trained on typos too": Head(
            *fit_head(np.concatenate([clean, bent]), np.concatenate([targets, targets]), classes)
        ),
    }
    results = []
    for target, head in heads.items():
        history = attack(*attacked, head, embed, budget=max(BUDGETS), seed=9)
        untouched = float((history[0] > 0).mean())
        for budget in BUDGETS:
            result = AttackResult(
                attack="adversarial-text",
                system="plaintext",
                target=target,
                metric=f"accuracy with {budget} words edited",
                value=float((history[budget] > 0).mean()),
                samples=len(attacked[0]),
                curve=target,
                at=budget,
            )
            if budget == max(BUDGETS) and target == "head":
                result = at_most(result, 0.6 * untouched)
            results.append(result)
    return results


def run(*, short: bool) -> list[AttackResult]:
    """On phrases of icd10-chapters."""
    data = embedded("icd10-chapters")
    rows, attacked = (400, 20) if short else (4000, 150)
    train, test = data.dataset.train, data.dataset.test
    chosen = np.random.default_rng(10).permutation(len(test.texts))[:attacked]
    return compare(
        (train.texts[:rows], train.targets[:rows]),
        ([test.texts[row] for row in chosen], test.targets[chosen]),
        data.classes,
        backbone().embed,
    )
