"""Registered keys, in bounded memory.

A key message is an encryption of zero: it decrypts nothing and tells nothing. Nothing is
persisted: a client whose key is gone registers the same bytes again.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _Entry:
    message: bytes
    registered: float
    used: float


class KeyStore:
    """Key messages by id; the least recently used make room, and all of them expire."""

    def __init__(
        self,
        *,
        max_bytes: int,
        idle_seconds: float,
        lifetime_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._idle = idle_seconds
        self._lifetime = lifetime_seconds
        self._clock = clock
        self._bytes = 0
        self._expired = 0
        self._evicted = 0
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes_held(self) -> int:
        """Bytes of all the registered key messages."""
        return self._bytes

    @property
    def expired_total(self) -> int:
        """Keys dropped so far because their time had come."""
        return self._expired

    @property
    def evicted_total(self) -> int:
        """Keys dropped so far to make room for others."""
        return self._evicted

    def put(self, key_id: bytes, message: bytes) -> bool:
        """Register a checked key message; True when it was not known before."""
        known = self.get(key_id) is not None
        if known:
            return False
        self._drop_expired()
        now = self._clock()
        self._entries[key_id] = _Entry(message, now, now)
        self._bytes += len(message)
        while self._bytes > self._max_bytes and len(self._entries) > 1:
            self._evicted += self.discard(next(iter(self._entries)))
        return True

    def get(self, key_id: bytes) -> bytes | None:
        """The key message of this id, or None when it is unknown or has expired."""
        entry = self._entries.get(key_id)
        if entry is None:
            return None
        if self._has_expired(entry):
            self._expired += self.discard(key_id)
            return None
        entry.used = self._clock()
        self._entries.move_to_end(key_id)
        return entry.message

    def discard(self, key_id: bytes) -> bool:
        """Forget a key; False when it was unknown."""
        entry = self._entries.pop(key_id, None)
        if entry is None:
            return False
        self._bytes -= len(entry.message)
        return True

    def _has_expired(self, entry: _Entry) -> bool:
        now = self._clock()
        return now - entry.used >= self._idle or now - entry.registered >= self._lifetime

    def _drop_expired(self) -> None:
        for key_id in [key for key, entry in self._entries.items() if self._has_expired(entry)]:
            self._expired += self.discard(key_id)
