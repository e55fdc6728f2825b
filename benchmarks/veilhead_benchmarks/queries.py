"""Veilhead's own two sides in memory: the client's session and the service's head."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from veilhead.session import EncryptedQuery, SecretKey, Session
from veilhead_benchmarks.heads import Head, Messages
from veilhead_benchmarks.rows import timed
from veilhead_service.encrypted_head import ClientKey, EncryptedHead

_KEY_CALLS = 9


class VeilheadExchange:
    """Texts one by one under one key, or in the requests that the SDK would choose.

    A single query's key is one that the service has ready, as after a client's first query. Every
    request of several texts has a fresh key: its making is part of `encrypt`, its loading of
    `evaluate`, and its message is registered apart from the request, as `bytes_keys` says.
    """

    def __init__(self, head: Head, parameters: str, *, together: bool = False) -> None:
        """Prepare both sides.

        Args:
            head: the head.
            parameters: the parameter set.
            together: many texts in a request, bulk allowed; else one request for every text.
        """
        self.artifact = head.artifact(parameters, bulk=together)
        manifest = self.artifact.manifest
        self._service = EncryptedHead(manifest, self.artifact.weight, self.artifact.bias)
        self._session = Session(manifest)
        self._together = together
        self._ready: dict[bytes, ClientKey] = {}
        self._queries: tuple[EncryptedQuery, ...] = ()
        self.parameters = parameters
        self._key_ms, key = timed(lambda: SecretKey(manifest.parameter_set), _KEY_CALLS)
        self._key_bytes = len(key.message)

    @property
    def bytes_keys(self) -> int:
        """Key messages: one, or those that the last requests of several texts carry."""
        return self._key_bytes * (len(self._queries) if self._together else 1)

    @property
    def note(self) -> str:
        """What a key takes, or how the texts were put into requests."""
        if not self._together:
            return f"a fresh key takes {self._key_ms:.2f} ms and serves many queries"
        found = Counter(
            f"{query.layout.texts} texts ({query.layout.kind.name.lower()})"
            for query in self._queries
        )
        return "; ".join(f"{count} of {kind}" for kind, count in found.items())

    def encrypt(self, embeddings: NDArray[np.float64]) -> Messages:
        """The queries for the rows [batch, d]."""
        if self._together:
            sizes = self._session.plan(len(embeddings))
            parts = np.split(embeddings, np.cumsum(sizes)[:-1])
            self._queries = tuple(map(self._session.encrypt_batch, parts))
        else:
            self._queries = tuple(map(self._session.encrypt, embeddings))
        return tuple(query.data for query in self._queries)

    def evaluate(self, requests: Messages) -> Messages:
        """A reply to each query."""
        return tuple(
            self._service.evaluate(request, self._registered(query.key))
            for request, query in zip(requests, self._queries, strict=True)
        )

    def _registered(self, key: SecretKey) -> ClientKey:
        if self._together:
            return ClientKey.from_message(key.message)
        if key.id not in self._ready:
            self._ready[key.id] = ClientKey.from_message(key.message)
        return self._ready[key.id]

    def decrypt(self, replies: Messages) -> NDArray[np.float64]:
        """Logits [batch, C]."""
        return np.concatenate(
            [
                self._session.decrypt_batch(query, reply)
                for query, reply in zip(self._queries, replies, strict=True)
            ]
        )
