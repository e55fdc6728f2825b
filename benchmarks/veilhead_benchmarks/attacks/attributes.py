"""Attribute inference: what an embedding tells of a person, whatever it is classified for.

Generated records say a diagnosis, a given name, a date of birth and an e-mail address. From other
records' embeddings the attacker learns to tell when the person was born, where they work, and the
sex that the name suggests. Then the same from noised embeddings; after de-identification
(`veilhead.deidentify`), which replaces dates of birth and addresses and does not know names, so
that what it leaves stays visible; and from what crosses the wire.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veilhead.deidentify import Deidentifier
from veilhead_benchmarks.attacks import naive
from veilhead_benchmarks.attacks.data import backbone, embedded
from veilhead_benchmarks.attacks.inversion import noised, query_features
from veilhead_benchmarks.attacks.results import AttackResult, above, at_chance
from veilhead_models.artifact import HeadArtifact
from veilhead_models.training import fit_head

# fmt: off
_WOMEN: Final = ("Maria", "Fatima", "Aisha", "Olga", "Chloe", "Priya", "Zofia", "Emma", "Anna")
_MEN: Final = ("James", "Jonas", "Pedro", "Ken", "Noah", "Lars", "David", "Thomas", "Peter")
_EMPLOYERS: Final = (
    ("harbor-hospital", "city-clinic", "nursing-home", "st-mary-hospice", "dental-care"),
    ("union-bank", "first-credit", "capital-invest", "mutual-savings", "trust-brokers"),
)
# fmt: on

_Array = NDArray[np.float64]

#: Embeds texts: [texts, d].
Embed = Callable[[Sequence[str]], _Array]


@dataclass(frozen=True)
class Person:
    """A generated record and what it says of somebody.

    Attributes:
        text: the record.
        attributes: 0 or 1 by name.
    """

    text: str
    attributes: dict[str, int]


#: Attribute -> whether de-identification takes it out.
ATTRIBUTES: Final = {"born after 1970": True, "works at a bank": True, "sex of name": False}


def people(phrases: Sequence[str], seed: int) -> list[Person]:
    """One record for each phrase; the attributes have nothing to do with it."""
    generator = random.Random(seed)  # noqa: S311  (not a secret)
    found = []
    for phrase in phrases:
        young, bank, man = (generator.randrange(2) for _ in range(3))
        year = generator.randint(1975, 2004) if young else generator.randint(1930, 1965)
        employer = generator.choice(_EMPLOYERS[bank])
        name = generator.choice((_WOMEN, _MEN)[man])
        date = f"{generator.randint(1, 12):02}/{generator.randint(1, 28):02}/{year}"
        address = f"{name.lower()}{generator.randint(10, 99)}@{employer}.example.com"
        values = dict(zip(ATTRIBUTES, (young, bank, man), strict=True))
        found.append(Person(f"{name}, DOB: {date}, e-mail {address}. {phrase}", values))
    return found


#: Noise of each value of a noised embedding, relative to the root mean square of the values.
NOISE: Final = 4.0

_PLAIN: Final = "embedding of the text as it is"
_REPLACED: Final = "embedding of the de-identified text"
_WIRES: Final = {"query bytes (standard)": "veilhead", "query bytes (TenSEAL mm)": "tenseal-mm"}


def infer(
    records: Sequence[Person], embed: Embed, *, train_rows: int, wires: Sequence[str] = ()
) -> list[AttackResult]:
    """The attack on every kind of vector; the first rows are the attacker's own.

    Args:
        records: the records.
        embed: the backbone.
        train_rows: records that the attacker knows.
        wires: of `_WIRES`, those whose queries are attacked too.
    """
    deidentifier = Deidentifier()
    texts = [record.text for record in records]
    embeddings = embed(texts)
    kinds = {
        _PLAIN: embeddings,
        f"embedding, noise {NOISE:g} of its size": noised(embeddings, NOISE, seed=1),
        _REPLACED: embed([deidentifier(text).text for text in texts]),
        **{wire: _on_the_wire(wire, embeddings) for wire in wires},
    }
    count = len(records) - train_rows
    results = []
    for target, vectors in kinds.items():
        for attribute, taken_out in ATTRIBUTES.items():
            values = np.array([record.attributes[attribute] for record in records], dtype=np.intp)
            weight, bias = fit_head(vectors[:train_rows], values[:train_rows], 2)
            answers = (vectors[train_rows:] @ weight.T + bias).argmax(axis=1)
            result = AttackResult(
                attack="attributes",
                system=_WIRES.get(target, "plaintext"),
                target=target,
                metric=f"accuracy: {attribute}",
                value=float((answers == values[train_rows:]).mean()),
                samples=count,
                chance=0.5,
            )
            if target in _WIRES or (target == _REPLACED and taken_out):
                result = at_chance(result, math.sqrt(0.25 / count))
            elif target in (_PLAIN, _REPLACED):
                result = above(result, 0.65)
            results.append(result)
    return results


def _on_the_wire(wire: str, embeddings: _Array) -> _Array:
    """What crosses it for each embedding, of norm one as embeddings are."""
    if _WIRES[wire] == "veilhead":
        manifest = HeadArtifact.from_weights(
            np.ones((2, embeddings.shape[1])), None, ("a", "b"), name="attacked"
        ).manifest
        features = query_features(manifest, embeddings)
    else:
        features = naive.query_features(embeddings)
    unit: _Array = features / np.linalg.norm(features, axis=1, keepdims=True)
    return unit


def run(*, short: bool) -> list[AttackResult]:
    """Records around phrases of icd10-chapters."""
    data = embedded("icd10-chapters")
    own, attacked = (200, 100) if short else (1200, 600)
    phrases = data.dataset.train.texts[: own + attacked]
    return infer(people(phrases, seed=6), backbone().embed, train_rows=own, wires=tuple(_WIRES))
