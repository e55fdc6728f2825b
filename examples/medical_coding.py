"""Medical coding: a hospital has phrases of its records sorted into chapters of ICD-10-CM.

The vendor's head is trained on real phrases of the classification (a sample, so that this takes
seconds; `veilhead-server train icd10-chapters` takes all of them). The hospital codes what the
model is sure of and hands the rest to a person.

Run it with `python examples/medical_coding.py`.
"""

import tempfile
from pathlib import Path

from veilhead import Client
from veilhead_models.backbone import minilm
from veilhead_models.datasets import load_dataset
from veilhead_models.training import train_artifact

SURE = 0.5

data = load_dataset("icd10-chapters").sample(train=1000, test=150)
artifact, report = train_artifact(data, *minilm(), name="icd10-chapters")

with tempfile.TemporaryDirectory() as directory:
    artifact.save(Path(directory) / "icd10-chapters")
    with Client.local(Path(directory) / "icd10-chapters") as hospital:
        answers = hospital.classify(data.test.texts, top_k=3)

truth = [data.labels[target] for target in data.test.targets]
first = sum(best[0].label == label for best, label in zip(answers, truth, strict=True))
among = sum(
    label in [one.label for one in best] for best, label in zip(answers, truth, strict=True)
)
sure = [(best, label) for best, label in zip(answers, truth, strict=True) if best[0].score >= SURE]
right = sum(best[0].label == label for best, label in sure)

print(f"phrases                    {len(answers)}")
print(f"right chapter first        {first / len(answers):.3f}")
print(f"the same head, plaintext   {report.accuracy:.3f}")
print(f"right chapter among three  {among / len(answers):.3f}")
print(f"coded without a person     {len(sure) / len(answers):.3f}")
print(f"of these right             {right / len(sure):.3f}")
