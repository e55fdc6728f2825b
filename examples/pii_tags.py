"""De-identification: a hospital group has values of persons found in its notes, and shows no note.

The vendor trains a head that tags e-mail addresses, phone numbers, card numbers and dates of birth.
It does so without privacy, and with differential privacy at epsilon 4 and 1 for whole records. The
records are generated and point at nobody: they show what the noise costs, not what a head finds in
real notes. Heads are judged by values that they were not trained on, in sentences of the same
kinds. In other sentences they find much less (docs/privacy.md).

Run it with `python examples/pii_tags.py`.
"""

import tempfile
from pathlib import Path

from veilhead import Client
from veilhead_benchmarks.pii_tags import tagged_records, with_new_values
from veilhead_models.backbone import Backbone, minilm, token_backbone
from veilhead_models.privacy import PrivacyBudget
from veilhead_models.tagging import calibrated_scale, embed_records, fit_tagger

KINDS = ("BIRTH_DATE", "CARD", "EMAIL", "PHONE")

train = tagged_records(600, seed=1, unseen=False, kinds=KINDS)
test = with_new_values(tagged_records(80, seed=2, unseen=False, kinds=KINDS), train)

# What `veilhead-server train FILE --task token-classification` does of a file of records, but the
# records are embedded once for all heads.
directory, section = token_backbone(*minilm())
backbone = Backbone.load(directory, section)
embedding = calibrated_scale(backbone)
embedded_train = embed_records(train, backbone, embedding.scale)
embedded_test = embed_records(test, backbone, embedding.scale)

reports = {}
for name, budget in (
    ("without privacy", None),
    ("epsilon 4", PrivacyBudget(4.0)),
    ("epsilon 1", PrivacyBudget(1.0)),
):
    head = fit_tagger(embedded_train, KINDS, budget)
    reports[name] = head.report(embedded_test, KINDS, train_records=len(train))
    if name == "epsilon 4":
        served = head.artifact(embedding, directory, section, name="pii")

note = "Please write to ada.ortiz@example.net about the refund."
with tempfile.TemporaryDirectory() as place:
    served.save(Path(place) / "pii")
    with Client.local(Path(place) / "pii") as hospital:  # the real service, run in this process
        found = hospital.classify_tokens(note, aggregation_strategy="average")

print(f"records               {len(train)} to train on, {len(test)} to judge by, generated")
print(f"found in a note       {[(one['entity_group'], one['word']) for one in found]}")
for name, report in reports.items():
    print(f"\n{name}\n{report.render()}")
