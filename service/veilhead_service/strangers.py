"""What is told of peers that nobody knows: how often, and never each time.

Whoever reaches the port can be refused without end. A line for each would fill a disk.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from veilhead_service.access_log import AccessLog

#: What is counted is told after so many seconds.
_TELL_SECONDS: Final = 60.0

logger = logging.getLogger("veilhead.service")


class Strangers:
    """Counts what peers without a good API key were refused, by kind.

    Once a minute, while there is something, a line for each kind goes to the log and to the access
    log. Kinds come from a closed set: codes of problems, and those of `framing.Refusal`.
    """

    def __init__(self, access_log: AccessLog | None, *, seconds: float = _TELL_SECONDS) -> None:
        self._access_log = access_log
        self._seconds = seconds
        self._counts: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def totals(self) -> dict[str, int]:
        """Refusals so far, by kind."""
        return dict(self._totals)

    def note(self, kind: str) -> None:
        """Count one refusal. Called in the event loop."""
        self._counts[kind] += 1
        self._totals[kind] += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self.tell)

    def tell(self) -> None:
        """Write what was counted since the last time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        counts, self._counts = self._counts, Counter()
        for kind, count in sorted(counts.items()):
            logger.info("refused without a good API key, in a minute: %s, %d times", kind, count)
            if self._access_log is not None:
                self._access_log.append(event="refused", problem=kind, count=count)
