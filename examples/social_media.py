"""Moderation of social media: posts are triaged as they come, by a moderator's private model.

A head is trained on real tweets with the mean of twenty raters' opinions (a sample). The platform
streams its posts through `classify_many`, which never holds more than a few chunks of them; a row
that is no text gets its error in its place and stops nothing.

Run it with `python examples/social_media.py`.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from veilhead import Client, VeilheadError
from veilhead_models.backbone import minilm
from veilhead_models.datasets import load_dataset
from veilhead_models.training import train_artifact

data = load_dataset("vader-tweets").sample(train=1000, test=200)
artifact, report = train_artifact(data, *minilm(), name="tone")


def posts() -> Iterator[str]:
    """What arrives: one row is damaged."""
    for row, text in enumerate(data.test.texts):
        yield None if row == 7 else text  # type: ignore[misc]


queues: Counter[str] = Counter()
right = 0
with tempfile.TemporaryDirectory() as directory:
    artifact.save(Path(directory) / "tone")
    with Client.local(Path(directory) / "tone") as platform:
        for row, answer in enumerate(platform.classify_many(posts())):
            if isinstance(answer, VeilheadError):
                print(f"not classified             {answer}")
                queues["to a person"] += 1
                continue
            [best] = answer
            queues[best.label] += 1
            right += best.label == data.labels[data.test.targets[row]]

print(f"posts                      {sum(queues.values())}")
print(f"queues                     {dict(sorted(queues.items()))}")
print(f"right                      {right / (len(data.test.texts) - 1):.3f}")
print(f"the same head, plaintext   {report.accuracy:.3f}")
