"""Work in the background that never ends in silence: it is logged, and begins again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from veilhead_protocol.errors import VeilheadError

#: Pauses before work that failed begins again: doubled each time, up to the longest.
FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 30.0

logger = logging.getLogger("veilhead.service")


def pause_after(failures: int, first: float, longest: float) -> float:
    """Seconds to wait after so many failures in a row, the first of which is 1."""
    return float(min(first * 2 ** min(failures - 1, 30), longest))


def reason_of(error: BaseException) -> str:
    """An exception in one line that holds nothing of a request.

    Messages of foreign exceptions may quote whatever failed; the operating system's do not.
    """
    if isinstance(error, VeilheadError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}"
    return type(error).__name__


async def keep_running(
    name: str,
    work: Callable[[], Awaitable[None]],
    *,
    first_pause: float = FIRST_PAUSE_SECONDS,
    longest_pause: float = LONGEST_PAUSE_SECONDS,
) -> None:
    """Do work until it returns; one that raises is logged with its reason and begins again.

    Pauses grow while failures come one upon another. Only a cancellation ends it otherwise.

    Args:
        name: what the log calls it.
        work: what is done.
        first_pause: seconds after the first failure.
        longest_pause: seconds that no pause exceeds.
    """
    clock = asyncio.get_running_loop().time
    failures = 0
    while True:
        began = clock()
        try:
            await work()
        except Exception as error:
            # Work that went well for longer than any pause begins anew.
            failures = 1 if clock() - began > longest_pause else failures + 1
            pause = pause_after(failures, first_pause, longest_pause)
            logger.error(
                "%s failed (%s): %s; it begins again in %g seconds",
                name,
                type(error).__name__,
                reason_of(error),
                pause,
                exc_info=error,
            )
            await asyncio.sleep(pause)
        else:
            return
