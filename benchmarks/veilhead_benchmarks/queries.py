"""Veilhead's own two sides in memory: the client's session and the service's head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from veilhead.session import EncryptedQuery, SecretKey, Session
from veilhead_benchmarks.heads import Head, Messages
from veilhead_benchmarks.rows import timed
from veilhead_models.artifact import HeadArtifact
from veilhead_service.encrypted_head import ClientKey, EncryptedHead

_KEY_CALLS = 9


class VeilheadExchange:
    """One text a request, under one key, which the service has ready as after a first query."""

    def __init__(self, head: Head, parameters: str) -> None:
        self.artifact: HeadArtifact = head.artifact(parameters)
        manifest = self.artifact.manifest
        self._service = EncryptedHead(manifest, self.artifact.weight, self.artifact.bias)
        self._session = Session(manifest)
        self._keys: dict[bytes, ClientKey] = {}
        self._queries: tuple[EncryptedQuery, ...] = ()
        self.parameters = parameters
        self._key_ms, key = timed(
            lambda: SecretKey(manifest.parameter_set, manifest.layout), _KEY_CALLS
        )
        self.bytes_keys = len(key.message)

    @property
    def note(self) -> str:
        """What a key takes."""
        return f"a fresh key takes {self._key_ms:.2f} ms and serves many queries"

    def encrypt(self, embeddings: NDArray[np.float64]) -> Messages:
        """A query for each row."""
        self._queries = tuple(self._session.encrypt(row) for row in embeddings)
        return tuple(query.data for query in self._queries)

    def evaluate(self, requests: Messages) -> Messages:
        """A reply to each query."""
        return tuple(
            self._service.evaluate(request, self._registered(query.key))
            for request, query in zip(requests, self._queries, strict=True)
        )

    def _registered(self, key: SecretKey) -> ClientKey:
        if key.id not in self._keys:
            self._keys[key.id] = ClientKey.from_message(key.message)
        return self._keys[key.id]

    def decrypt(self, replies: Messages) -> NDArray[np.float64]:
        """Logits [batch, C]."""
        return np.stack(
            [
                self._session.decrypt(query, reply)
                for query, reply in zip(self._queries, replies, strict=True)
            ]
        )
