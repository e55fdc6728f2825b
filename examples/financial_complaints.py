"""Financial complaints: a bank has complaints sorted by product, after taking personal data out.

The vendor sees only ciphertexts in any case. De-identification is a second wall: labels that are
shown to a malicious service may say something of an embedding, and then there is less in it. Does
it cost accuracy? This measures it on narratives that the US CFPB published (a sample). They are
masked already, so each gets the address and the card number of an invented person.

Run it with `python examples/financial_complaints.py`.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from veilhead import Client
from veilhead.deidentify import Deidentifier
from veilhead_models.backbone import minilm
from veilhead_models.datasets import Split, load_dataset
from veilhead_models.training import train_artifact

PERSONAL = "Reach me at jane.doe@example.com, my card is 4111 1111 1111 1111."


def with_personal_data(split: Split) -> Split:
    """The narratives, shortened so that this takes seconds, with somebody's data in them."""
    return replace(split, texts=tuple(f"{PERSONAL} {text[:300]}" for text in split.texts))


data = load_dataset("cfpb").sample(train=400, test=120)
data = replace(data, train=with_personal_data(data.train), test=with_personal_data(data.test))
artifact, report = train_artifact(data, *minilm(), name="complaints")

with tempfile.TemporaryDirectory() as directory:
    artifact.save(Path(directory) / "complaints")
    accuracy = {}
    for deidentify in (False, True):
        with Client.local(Path(directory) / "complaints", deidentify=deidentify) as bank:
            found = bank.predict(data.test.texts)
        truth = [data.labels[target] for target in data.test.targets]
        accuracy[deidentify] = np.mean(
            [one == other for one, other in zip(found, truth, strict=True)]
        )

print(f"what is embedded           {Deidentifier()(PERSONAL).text}")
print(f"complaints                 {len(data.test.texts)}")
print(f"as written                 {accuracy[False]:.3f}")
print(f"the same head, plaintext   {report.accuracy:.3f}")
print(f"de-identified              {accuracy[True]:.3f}")
