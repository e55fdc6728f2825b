"""Registered keys, in bounded memory, each for its tenant alone.

A key message is an encryption of zero: it decrypts nothing and tells nothing. Nothing is
persisted: a client whose key is gone registers the same bytes again.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class _Entry:
    message: bytes
    registered: float
    used: float


@dataclass
class _Keys:
    """One tenant's keys, least recently used first."""

    entries: OrderedDict[bytes, _Entry] = field(default_factory=OrderedDict)
    bytes: int = 0


class KeyStore:
    """Key messages by tenant and id; the least recently used make room, and all of them expire.

    A tenant that passes its own bound loses keys of its own. When all memory is used, the tenant
    that holds most of it makes room: none can push out the keys of one that holds less.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        max_tenant_bytes: int,
        idle_seconds: float,
        lifetime_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._max_tenant_bytes = max_tenant_bytes
        self._idle = idle_seconds
        self._lifetime = lifetime_seconds
        self._clock = clock
        self._tenants: dict[str, _Keys] = {}
        self._expired = 0
        self._evicted = 0

    def __len__(self) -> int:
        return sum(len(keys.entries) for keys in self._tenants.values())

    @property
    def bytes_held(self) -> int:
        """Bytes of all the registered key messages."""
        return sum(keys.bytes for keys in self._tenants.values())

    @property
    def expired_total(self) -> int:
        """Keys dropped so far because their time had come."""
        return self._expired

    @property
    def evicted_total(self) -> int:
        """Keys dropped so far to make room for others."""
        return self._evicted

    def put(self, tenant: str, key_id: bytes, message: bytes) -> bool:
        """Register a checked key message; True when it was not known before."""
        if self.get(tenant, key_id) is not None:
            return False
        self._drop_expired()
        now = self._clock()
        keys = self._tenants.setdefault(tenant, _Keys())
        keys.entries[key_id] = _Entry(message, now, now)
        keys.bytes += len(message)
        while keys.bytes > self._max_tenant_bytes and len(keys.entries) > 1:
            self._drop_oldest(tenant)
        while self.bytes_held > self._max_bytes and len(self) > 1:
            self._drop_oldest(max(self._tenants, key=self._bytes_without(tenant, key_id)))
        return True

    def get(self, tenant: str, key_id: bytes) -> bytes | None:
        """The tenant's key message of this id, or None when it is unknown or has expired."""
        keys = self._tenants.get(tenant)
        entry = None if keys is None else keys.entries.get(key_id)
        if keys is None or entry is None:
            return None
        if self._has_expired(entry):
            self._expired += self.discard(tenant, key_id)
            return None
        entry.used = self._clock()
        keys.entries.move_to_end(key_id)
        return entry.message

    def discard(self, tenant: str, key_id: bytes) -> bool:
        """Forget a tenant's key; False when it was unknown."""
        keys = self._tenants.get(tenant)
        entry = None if keys is None else keys.entries.pop(key_id, None)
        if keys is None or entry is None:
            return False
        keys.bytes -= len(entry.message)
        if not keys.entries:
            del self._tenants[tenant]
        return True

    def _bytes_without(self, tenant: str, key_id: bytes) -> Callable[[str], int]:
        """What each tenant holds that could make room: not the key that needs it."""

        def held(name: str) -> int:
            keys = self._tenants[name]
            return keys.bytes - (len(keys.entries[key_id].message) if name == tenant else 0)

        return held

    def _drop_oldest(self, tenant: str) -> None:
        self._evicted += self.discard(tenant, next(iter(self._tenants[tenant].entries)))

    def _has_expired(self, entry: _Entry) -> bool:
        now = self._clock()
        return now - entry.used >= self._idle or now - entry.registered >= self._lifetime

    def _drop_expired(self) -> None:
        expired = [
            (tenant, key_id)
            for tenant, keys in self._tenants.items()
            for key_id, entry in keys.entries.items()
            if self._has_expired(entry)
        ]
        for tenant, key_id in expired:
            self._expired += self.discard(tenant, key_id)
