"""Private classification of images: any embedding will do, not only a text's.

A vendor trains a head on scikit-learn's handwritten digits (64 pixel values each); a client has
its own images classified without showing them. Run it with `python examples/digits.py`.
"""

import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from veilhead import Client
from veilhead_models.artifact import HeadArtifact

images, digits = load_digits(return_X_y=True)  # [1797, 64] of 0 to 16
train, test, train_digits, test_digits = train_test_split(
    images, digits, test_size=0.25, random_state=1, stratify=digits
)
# Clients divide an embedding by this and shorten what is still longer than one.
scale = float(np.linalg.norm(train, axis=1).max())
head = LogisticRegression(C=0.01, max_iter=2000).fit(train, train_digits)

with tempfile.TemporaryDirectory() as directory:
    artifact = HeadArtifact.from_weights(
        head.coef_,
        head.intercept_,
        [str(digit) for digit in head.classes_],
        embedding_scale=scale,
    )
    artifact.save(Path(directory) / "digits")
    with Client.local(Path(directory) / "digits") as client:
        logits = client.logits(test)  # [450, 10], from encrypted pixels

plaintext = head.decision_function(test)
print(f"accuracy, encrypted  {np.mean(logits.argmax(axis=1) == test_digits):.4f}")
print(f"accuracy, plaintext  {head.score(test, test_digits):.4f}")
print(f"largest logit error  {np.abs(logits - plaintext).max():.6f}")
print(f"its bound            {artifact.scales.error_bound:.6f}")
