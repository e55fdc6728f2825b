"""When a refusal is answered: at once, or later for who asks for more and more of them.

A refusal costs as much as many an answer. Who ignores `Retry-After` gets the next ones later, and
sends the less meanwhile; nobody else waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

#: The longest that a refusal waits.
LONGEST_SECONDS: Final = 5.0

#: What a tenant is refused for a while.
_RETRYABLE: Final = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})

_ERRORS: Final = 400


class Pacing:
    """Refusals a second, of each tenant, and of each address without a good API key.

    The generic cell rate algorithm (ITU-T I.371), with a second's refusals at once.
    """

    def __init__(self, per_second: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds_each = 1 / per_second
        self._clock = clock
        self._due: dict[tuple[bool, str], float] = {}  # when the next one would be in time

    def take(self, tenant: str | None, peer: str, status: int) -> float:
        """Seconds to wait before this answer is sent; 0 for what is no refusal."""
        if tenant is None:
            if status < _ERRORS:
                return 0.0
        elif status not in _RETRYABLE:
            return 0.0
        who = (False, peer) if tenant is None else (True, tenant)
        now = self._clock()
        due = max(self._due.get(who, now), now)
        self._due[who] = min(due + self._seconds_each, now + 1 + LONGEST_SECONDS)
        return min(max(0.0, due - now - 1), LONGEST_SECONDS)

    def forget(self) -> None:
        """Drop what no longer makes anybody wait."""
        now = self._clock()
        for who in [who for who, due in self._due.items() if due <= now]:
            del self._due[who]
