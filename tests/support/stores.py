"""Stores that a test publishes into, and a clock for their dates."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from veilhead_service.model_store import publish


class Clock:
    """A time that a test sets."""

    def __init__(self):
        self.now = datetime(2027, 1, 1, tzinfo=UTC)

    def __call__(self):
        return self.now

    def move(self, **delta):
        self.now += timedelta(**delta)


class Vendor:
    """Someone who saves heads and publishes them into a store."""

    def __init__(self, root):
        self.root = root
        self.store = root / "store"

    def save(self, head):
        directory = self.root / "artifacts" / f"{head.name}-{head.salt.hex()[:8]}"
        head.save(directory)
        return directory

    def publish(self, head, **options):
        """The digest of the published version, in hexadecimal."""
        return publish(self.save(head), self.store, **options).digest.hex()

    def version(self, name, digest):
        """The directory of a version."""
        return self.store / name / digest
