"""Whether the vendor's service can be reached: asked again and again, without any text."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from veilhead_protocol.errors import VeilheadError

#: A probe is made so often, and may take so long.
PROBE_SECONDS: Final = 10.0

#: So many probes in a row must fail before the gateway says that it is not ready.
FAILURES: Final = 2

_logger = logging.getLogger("veilhead.gateway")


class Upstream:
    """What the last probes of the service said."""

    def __init__(
        self, probe: Callable[[], Awaitable[None]], *, seconds: float = PROBE_SECONDS
    ) -> None:
        """Nothing is asked before `watch`.

        Args:
            probe: asks the service whether it is ready, and raises when it is not.
            seconds: between two probes, and for each of them.
        """
        self._probe = probe
        self._seconds = seconds
        self._failed = 0
        self._kind = ""
        self._last_success: float | None = None

    @property
    def ready(self) -> bool:
        """Whether it answered lately."""
        return self._failed < FAILURES

    def described(self) -> dict[str, Any]:
        """For `/health`: numbers and the kind of failure, nothing that the service said."""
        ago = None if self._last_success is None else time.monotonic() - self._last_success
        return {
            "ready": self.ready,
            "seconds_since_success": None if ago is None else round(ago, 1),
            "failed_probes": self._failed,
            "failure": self._kind or None,
        }

    async def watch(self) -> None:
        """Probe until this is cancelled."""
        while True:
            await self._ask()
            await asyncio.sleep(self._seconds)

    async def _ask(self) -> None:
        was = self.ready
        try:
            async with asyncio.timeout(self._seconds):
                await self._probe()
        except TimeoutError:
            self._failed, self._kind = self._failed + 1, "timeout"
        except VeilheadError as error:
            self._failed, self._kind = self._failed + 1, error.code
        except Exception as error:
            self._failed, self._kind = self._failed + 1, type(error).__name__
        else:
            self._failed, self._kind, self._last_success = 0, "", time.monotonic()
        if was and not self.ready:
            _logger.warning("the vendor's service is not ready: %s", self._kind)
        elif self.ready and not was:
            _logger.warning("the vendor's service is ready again")
