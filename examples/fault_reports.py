"""Manufacturing: a plant has its fault reports routed by a maker of machines, without showing them.

The reports are generated from parts, symptoms and moods of writing below: they are no real data.
The maker knows which of its assemblies a symptom points to; the plant does not want it to know
what fails, where, and how often.

Run it with `python examples/fault_reports.py`.
"""

import csv
import random
import tempfile
from pathlib import Path

from veilhead import Client
from veilhead_models.backbone import minilm
from veilhead_models.datasets import load_dataset
from veilhead_models.training import train_artifact

SYMPTOMS = {
    "bearing": ["grinding noise", "rough rotation", "heat at the housing", "grease leaking out"],
    "drive": ["motor trips", "belt slips", "jerks at start", "does not reach speed"],
    "hydraulics": ["pressure drops", "oil under the press", "slow cylinder", "pump whines"],
    "sensor": ["no signal", "value jumps", "wrong reading at rest", "drifts when warm"],
    "control": ["display frozen", "restarts by itself", "program lost", "bus error on the panel"],
}
PLACES = ["line 2", "the packaging cell", "press 14", "hall B", "the filling station", "robot 7"]
FORMS = [
    "{symptom} at {place} since this morning",
    "Operator reports: {symptom}, {place}. Stopped for now.",
    "{place} - {symptom} again, third time this week",
    "night shift found {symptom} on {place}, please check",
]

generator = random.Random(5)  # noqa: S311
rows = [
    (generator.choice(FORMS).format(symptom=symptom, place=generator.choice(PLACES)), assembly)
    for assembly, symptoms in SYMPTOMS.items()
    for symptom in symptoms
    for _ in range(20)
]

with tempfile.TemporaryDirectory() as directory:
    table = Path(directory) / "faults.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("report", "assembly"), *rows])
    data = load_dataset(table, text="report", label="assembly")
    artifact, report = train_artifact(data, *minilm(), name="faults")
    artifact.save(Path(directory) / "faults")
    with Client.local(Path(directory) / "faults") as plant:
        routed = plant.predict(data.test.texts)
        [unseen] = plant.classify("spindle makes a scraping sound and the housing is hot")

right = sum(
    data.labels[target] == label for label, target in zip(routed, data.test.targets, strict=True)
)
print(f"reports                    {len(routed)}, generated")
print(f"right assembly             {right / len(routed):.3f}")
print(f"the same head, plaintext   {report.accuracy:.3f}")
print(f"a report of another form   {unseen.label} ({unseen.score:.2f})")
