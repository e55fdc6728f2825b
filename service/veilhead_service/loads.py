"""Which published versions can be answered for, and what became of the others.

A version that no worker has loaded yet may be the one that ends whoever loads it: a head too large
for the memory, a fault in a library. So each is first loaded by one worker while the others go on.
If that one dies or hangs, the version is tried alone, in a process that serves nothing else. If
that ends like the first, it is quarantined: queries for it are refused at once, and it is tried
alone again from time to time. Once that goes well it is served like any other. A worker that dies
while it loads nothing counts against no version, nor does one death where loads went well before.

What cannot be read, and what a worker refuses to answer with, is named here too.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from veilhead_protocol.errors import ModelRetiredError, ModelUnavailableError, StoreError
from veilhead_protocol.manifest import Manifest
from veilhead_service.background import pause_after, reason_of
from veilhead_service.model_store import ModelSource, StoredModel

#: Workers that a version may cost before it is quarantined.
_DEATHS: Final = 2

#: Between two attempts at a version that is unavailable: doubled each time, up to the longest.
FIRST_RETRY_SECONDS: Final = 30.0
LONGEST_RETRY_SECONDS: Final = 3600.0

logger = logging.getLogger("veilhead.service")


class Why(StrEnum):
    """Why a model is unavailable."""

    UNREADABLE = "unreadable"  # the service cannot read its files, or they are damaged
    REFUSED = "refused"  # a worker cannot load it, or its self-test fails
    QUARANTINED = "quarantined"  # workers died or hung while they loaded it


@dataclass(frozen=True)
class Unavailable:
    """A model that is published and cannot be answered for.

    Attributes:
        name: the model's name.
        digest: the version's, in hexadecimal; None when that cannot be read.
        why: the kind of reason.
        reason: for the operator: it may name paths, and goes to no client.
        retry_seconds: until the next attempt; None when there is one with every look at the store.
    """

    name: str
    digest: str | None
    why: Why
    reason: str
    retry_seconds: float | None = None


class Catalogue(NamedTuple):
    """The current versions of a store.

    Attributes:
        models: those that can be read.
        unreadable: the names of the others, each with the reason.
    """

    models: list[StoredModel]
    unreadable: dict[str, str]


def read_catalogue(source: ModelSource) -> Catalogue:
    """The current version of every model; one that cannot be read does not hide the others.

    Raises:
        StoreError: when not even the names can be read.
    """
    found = Catalogue([], {})
    for name in source.names():
        try:
            model = source.current(name)
        except ModelRetiredError:
            continue
        except (StoreError, OSError) as error:
            found.unreadable[name] = reason_of(error)
            continue
        if model is not None:
            found.models.append(model)
    return found


def head_bytes(manifest: Manifest) -> int:
    """Bytes that the head of this manifest takes in a worker, encoded for single texts.

    Its weights in double precision, and a polynomial of 8 N bytes for every product of the layout.
    """
    layout = manifest.layout
    return 8 * (layout.classes * layout.dimensions + layout.products * layout.degree)


_Stamp = tuple[int, int] | None


def _stamp(model: StoredModel) -> _Stamp:
    """What changes when the version is published again; None when it is gone."""
    try:
        status = os.stat(model.directory)  # noqa: PTH116
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


@dataclass
class _Trouble:
    """What went wrong with a version so far."""

    model: StoredModel
    stamp: _Stamp
    why: Why
    reason: str = ""
    deaths: int = 0
    failures: int = 0  # since it became unavailable
    next_attempt: float = 0.0

    @property
    def is_quarantined(self) -> bool:
        return self.deaths >= _DEATHS


class Loads:
    """What the pool knows of loading."""

    def __init__(self, memory_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing is known yet.

        Args:
            memory_bytes: a head that takes more than this is refused without being loaded.
            clock: seconds that only ever advance.
        """
        self._memory_bytes = memory_bytes
        self._clock = clock
        self._proven: set[bytes] = set()
        self._troubles: dict[bytes, _Trouble] = {}
        self._unreadable: dict[str, str] = {}

    def is_proven(self, model: StoredModel) -> bool:
        """Whether a worker has loaded this version, and none has died of it since."""
        return model.manifest.digest in self._proven

    def check(self, model: StoredModel) -> None:
        """See whether a worker may be given this version.

        Raises:
            ModelUnavailableError: when it cost a worker and was not tried alone since, is
                quarantined, or is too large for any worker.
        """
        digest = model.manifest.digest
        if digest in self._proven:
            return
        trouble = self._troubles.get(digest)
        if trouble is not None and trouble.stamp != _stamp(model):
            del self._troubles[digest]  # it was published again
            trouble = None
        if trouble is not None and trouble.deaths:
            what = (
                "is quarantined" if trouble.is_quarantined else "cost a worker and is tried alone"
            )
            raise ModelUnavailableError(f"the model {model.manifest.name} {what}: {trouble.reason}")
        needed = head_bytes(model.manifest)
        if needed > self._memory_bytes:
            reason = (
                f"its head takes {needed} bytes, and a worker may hold {self._memory_bytes}: "
                "raise worker_memory_bytes"
            )
            if trouble is None:
                self.refused(model, reason)
            raise ModelUnavailableError(f"the model {model.manifest.name}: {reason}")

    def loaded(self, model: StoredModel) -> None:
        """A worker has loaded this version, and it passed its self-test."""
        self._proven.add(model.manifest.digest)
        trouble = self._troubles.pop(model.manifest.digest, None)
        if trouble is not None and (trouble.is_quarantined or trouble.why is Why.REFUSED):
            logger.warning("the model %s can be served again", model.manifest.name)

    def refused(self, model: StoredModel, reason: str) -> None:
        """A worker would not answer with this version, and is none the worse for it."""
        self._proven.discard(model.manifest.digest)
        trouble = self._trouble(model, Why.REFUSED)
        trouble.deaths = 0
        if self._failed(trouble, Why.REFUSED, reason):
            logger.error("the model %s cannot be loaded: %s", model.manifest.name, reason)

    def died(self, model: StoredModel, reason: str) -> None:
        """A worker was lost while it loaded this version."""
        trouble = self._trouble(model, Why.QUARANTINED)
        trouble.deaths += 1
        name = model.manifest.name
        logger.error("a worker was lost while it loaded the model %s: %s", name, reason)
        if not trouble.is_quarantined:
            trouble.why, trouble.reason, trouble.next_attempt = Why.QUARANTINED, reason, -math.inf
            return
        self._proven.discard(model.manifest.digest)
        self._failed(trouble, Why.QUARANTINED, reason)
        logger.error(
            "the model %s, version %s, is quarantined: %s; it is tried again, alone, in %g "
            "seconds, or when `veilhead-server models retry %s` asks for it",
            name,
            model.manifest.digest.hex(),
            reason,
            trouble.next_attempt - self._clock(),
            name,
        )

    def _trouble(self, model: StoredModel, why: Why) -> _Trouble:
        digest = model.manifest.digest
        trouble = self._troubles.get(digest)
        if trouble is None or trouble.stamp != _stamp(model):
            trouble = self._troubles[digest] = _Trouble(model, _stamp(model), why)
        return trouble

    def _failed(self, trouble: _Trouble, why: Why, reason: str) -> bool:
        """Note a failure and when to try again; whether it is another than before."""
        is_news = (trouble.why, trouble.reason) != (why, reason)
        trouble.why, trouble.reason = why, reason
        trouble.failures += 1
        pause = pause_after(trouble.failures, FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS)
        trouble.next_attempt = self._clock() + pause
        return is_news

    def due(self) -> list[StoredModel]:
        """Unavailable versions that are to be tried again now; removed ones are forgotten."""
        for digest, trouble in list(self._troubles.items()):
            if _stamp(trouble.model) is None:
                del self._troubles[digest]
        now = self._clock()
        return [
            trouble.model
            for digest, trouble in self._troubles.items()
            if digest not in self._proven and trouble.next_attempt <= now
        ]

    def is_put_off(self, model: StoredModel) -> bool:
        """Whether this version failed, and is not to be loaded ahead until it was tried alone."""
        digest = model.manifest.digest
        trouble = self._troubles.get(digest)
        return digest not in self._proven and trouble is not None and trouble.stamp == _stamp(model)

    def retry(self, name: str) -> bool:
        """Try the versions of this name again soon; whether there were any to try."""
        found = False
        for trouble in self._troubles.values():
            if trouble.failures and trouble.model.manifest.name == name:
                trouble.next_attempt = self._clock()
                found = True
        return found

    def note_unreadable(self, unreadable: Mapping[str, str]) -> None:
        """Note what the last look at the store could not read; the log tells what is new."""
        for name, reason in unreadable.items():
            if self._unreadable.get(name) != reason:
                logger.error("the model %s cannot be read: %s", name, reason)
        for name in self._unreadable.keys() - unreadable.keys():
            logger.warning("the model %s can be read again", name)
        self._unreadable = dict(unreadable)

    def unavailable(self) -> list[Unavailable]:
        """Every model that cannot be answered for, by name."""
        now = self._clock()
        rows = [
            Unavailable(name, None, Why.UNREADABLE, reason)
            for name, reason in self._unreadable.items()
        ]
        for digest, trouble in self._troubles.items():
            if trouble.failures:
                model = trouble.model
                left = max(0.0, trouble.next_attempt - now)
                rows.append(
                    Unavailable(
                        model.manifest.name, digest.hex(), trouble.why, trouble.reason, left
                    )
                )
        return sorted(rows, key=lambda row: (row.name, row.digest or ""))


def that_fit(
    models: Iterable[StoredModel], limit_bytes: int, used: Mapping[bytes, float]
) -> list[StoredModel]:
    """The versions that a worker holds ahead of queries: those used last, then by name.

    Args:
        models: current versions.
        limit_bytes: bytes of heads that a worker keeps.
        used: when a version was last asked for, by digest.
    """
    chosen, total = [], 0
    for model in sorted(
        models,
        key=lambda model: (-used.get(model.manifest.digest, -1.0), model.manifest.name),
    ):
        size = head_bytes(model.manifest)
        if total + size <= limit_bytes:
            chosen.append(model)
            total += size
    return chosen
