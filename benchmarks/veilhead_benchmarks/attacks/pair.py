"""A client and a service for one head, without HTTP: what the attacks on a head attack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from veilhead.session import EncryptedQuery, Session
from veilhead_models.artifact import HeadArtifact
from veilhead_protocol.wire import Domain, Prng, QueryMessage
from veilhead_service.encrypted_head import ClientKey, EncryptedHead

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """A session and the head that answers it."""

    artifact: HeadArtifact
    session: Session
    head: EncryptedHead

    @classmethod
    def of(
        cls, artifact: HeadArtifact, service: Callable[..., EncryptedHead] = EncryptedHead
    ) -> Pair:
        """A fresh session with a head: the product's, or one with a protection taken out."""
        manifest = artifact.manifest
        head = service(manifest, artifact.weight, artifact.bias)
        return cls(artifact, Session(manifest), head)

    def answer(self, query: EncryptedQuery) -> bytes:
        """The service's reply to a query."""
        return self.head.evaluate(query.data, ClientKey.from_message(query.key.message))

    def logits(self, embeddings: _Array) -> _Array:
        """What the client has of embeddings [b, d] in the end: logits [b, C]."""
        found, start = [], 0
        for count in self.session.plan(len(embeddings)):
            query = self.session.encrypt_batch(embeddings[start : start + count])
            found.append(self.session.decrypt_batch(query, self.answer(query)))
            start += count
        return np.concatenate(found)

    def crafted(self, polynomials: _Array) -> EncryptedQuery:
        """A query of one text whose polynomials [P, N] are of the attacker's making."""
        manifest, layout = self.artifact.manifest, self.head.layout
        key = self.session.encrypt(np.zeros(manifest.head.dimensions)).key
        message = QueryMessage(
            parameters=manifest.parameter_set,
            model_digest=manifest.digest,
            key_id=key.id,
            layout=layout,
            prng=Prng.BLAKE2XB,
            domain=Domain.NTT,
            polynomials=(),
        )
        return EncryptedQuery(
            key,
            message,
            manifest.scales.reply_bits,
            lambda: tuple(
                key.encrypt(coefficients, manifest.scales.query_scale_bits)
                for coefficients in polynomials
            ),
        )


def random_head(
    classes: int, dimensions: int, *, seed: int = 1, parameters: str = "standard"
) -> HeadArtifact:
    """A head of the size that trained ones have."""
    generator = np.random.default_rng(seed)
    return HeadArtifact.from_weights(
        generator.normal(scale=0.5, size=(classes, dimensions)),
        generator.normal(size=classes),
        [f"label {index}" for index in range(classes)],
        name="attacked",
        parameters=parameters,
    )


def relative_error(found: _Array, wanted: _Array) -> float:
    """Norm of what is wrong over norm of what is wanted; guessing zeros gives 1."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
