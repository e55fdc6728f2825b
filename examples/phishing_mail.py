"""Network security: a company has its mail judged without showing it to the vendor of the filter.

A head is trained on SpamAssassin's public corpus (a sample; its messages come through npm). A
blocked letter costs more than a spam let through, so the company sets its own threshold: on a part
of its held-out mail, such that at most one letter in a hundred is blocked, and looks at the rest.

Run it with `python examples/phishing_mail.py`.
"""

import tempfile
from pathlib import Path

import numpy as np

from veilhead import Client
from veilhead_models.backbone import minilm
from veilhead_models.datasets import load_dataset
from veilhead_models.training import train_artifact

data = load_dataset("spam-assassin").sample(train=300, test=160)
artifact, report = train_artifact(data, *minilm(), name="mail")

with tempfile.TemporaryDirectory() as directory:
    artifact.save(Path(directory) / "mail")
    with Client.local(Path(directory) / "mail") as company:
        spam = company.predict_proba(data.test.texts)[:, data.labels.index("spam")]

is_spam = data.test.targets == data.labels.index("spam")
tuned = np.arange(len(spam)) < len(spam) // 2  # one half sets the threshold, the other judges it
letters = np.sort(spam[tuned & ~is_spam])
threshold = letters[int(np.ceil(0.99 * len(letters))) - 1]
blocked = spam[~tuned] > threshold

print(f"messages                   {len(spam)}")
print(f"accuracy at one half       {np.mean((spam > 0.5) == is_spam):.3f}")
print(f"the same head, plaintext   {report.accuracy:.3f}")
print(f"threshold                  {threshold:.3f}")
print(f"spam that is blocked       {np.mean(blocked[is_spam[~tuned]]):.3f}")
print(f"letters that are blocked   {np.mean(blocked[~is_spam[~tuned]]):.3f}")
