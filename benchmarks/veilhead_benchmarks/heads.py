"""Heads to measure with, and the way in which every system is asked to answer one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from veilhead_benchmarks.processes import unit_rows
from veilhead_benchmarks.rows import Row, System, added, timed
from veilhead_models.artifact import HeadArtifact
from veilhead_protocol.manifest import PolicySection

_SEED = 1

#: What one side sends the other: one message or several, in order.
Messages = tuple[bytes, ...]


@dataclass(frozen=True, eq=False)
class Head:
    """A head [C, d] in plaintext. Times and bytes do not depend on what is in it."""

    weight: NDArray[np.float64]  # [C, d]
    bias: NDArray[np.float64]  # [C]

    @classmethod
    def random(cls, classes: int, dimensions: int) -> Head:
        """Rows of norm about ten, as trained heads have them."""
        generator = np.random.default_rng(_SEED)
        scale = 10 / np.sqrt(dimensions)
        return cls(
            weight=generator.normal(scale=scale, size=(classes, dimensions)),
            bias=generator.normal(size=classes),
        )

    @property
    def classes(self) -> int:
        """C."""
        return len(self.bias)

    @property
    def dimensions(self) -> int:
        """The d values of an embedding."""
        return int(self.weight.shape[1])

    def embeddings(self, batch: int) -> NDArray[np.float64]:
        """Random embeddings [batch, d] of norm one, the same in every run."""
        return unit_rows(batch, self.dimensions, _SEED)

    def logits(self, embeddings: NDArray[np.float64]) -> NDArray[np.float64]:
        """The plaintext answer [batch, C]."""
        answer: NDArray[np.float64] = embeddings @ self.weight.T + self.bias
        return answer

    def artifact(self, parameters: str, *, bulk: bool = False) -> HeadArtifact:
        """The head as the service loads it; `bulk` as its policy has it."""
        labels = [f"label {index}" for index in range(self.classes)]
        return HeadArtifact.from_weights(
            self.weight,
            self.bias,
            labels,
            name="benchmark",
            parameters=parameters,
            policy=PolicySection(bulk=bulk),
        )


class Exchange(Protocol):
    """Both sides of one system around one head, with nothing but bytes between them.

    What a client does once for many requests (keys), and a service once for many clients (encoding
    a head), happens when the exchange is made.
    """

    @property
    def parameters(self) -> str:
        """What the security and the precision rest on."""

    @property
    def bytes_keys(self) -> int:
        """Bytes that the client registers once."""

    @property
    def note(self) -> str:
        """What else there is to say."""

    def encrypt(self, embeddings: NDArray[np.float64]) -> Messages:
        """The client's requests for embeddings [batch, d]."""

    def evaluate(self, requests: Messages) -> Messages:
        """The service's replies."""

    def decrypt(self, replies: Messages) -> NDArray[np.float64]:
        """The client's logits [batch, C]."""


def measure(
    subject: str, system: System, exchange: Exchange, head: Head, *, batch: int, calls: int
) -> Row:
    """One row: the medians of so many calls of each step, and the distance from plaintext."""
    embeddings = head.embeddings(batch)
    warm_up = 1 if calls < 10 else 3
    encrypt_ms, requests = timed(lambda: exchange.encrypt(embeddings), calls, warm_up)
    server_ms, replies = timed(lambda: exchange.evaluate(requests), calls, warm_up)
    decrypt_ms, logits = timed(lambda: exchange.decrypt(replies), calls, warm_up)
    return Row(
        subject=subject,
        system=system,
        parameters=exchange.parameters,
        d=head.dimensions,
        classes=head.classes,
        batch=batch,
        server_ms=server_ms,
        encrypt_ms=encrypt_ms,
        decrypt_ms=decrypt_ms,
        total_ms=added(encrypt_ms, server_ms, decrypt_ms),
        bytes_keys=exchange.bytes_keys,
        bytes_up=sum(map(len, requests)),
        bytes_down=sum(map(len, replies)),
        max_error=float(np.abs(logits - head.logits(embeddings)).max()),
        note=exchange.note,
    )
