"""A thread with a connection of its own to the state, and the promise that nobody waits long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from veilhead_protocol.copies import process_mark
from veilhead_protocol.errors import StateError
from veilhead_service.state import State
from veilhead_service.state_file import BUSY_SECONDS, COPIED

#: A wait that differs by less is left as it is: setting it takes longer.
_CLOSE_ENOUGH: Final = 0.05

_Value = TypeVar("_Value")


class Lane:
    """Calls on the state, one after the other.

    A call that cannot begin in time, because those before it wait for a lock, fails as they do:
    the time counts from when it was asked for, so a lock of any length costs nobody more than
    `BUSY_SECONDS`.
    """

    def __init__(self, name: str, open_state: Callable[[], State]) -> None:
        """A lane whose connection is opened by the first call.

        Args:
            name: of the thread.
            open_state: opens the connection, in the thread.
        """
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"veilhead-state-{name}")
        self._open_state = open_state
        self._process: int | None = None  # whose the thread is, once there is one
        self._state: State | None = None
        self._waits = 0.0
        self._must_checkpoint = False

    @property
    def needs_checkpoint(self) -> bool:
        """Whether this connection wrote much, or a checkpoint was not finished."""
        return self._must_checkpoint or (self._state is not None and self._state.needs_checkpoint)

    def ask_for_checkpoint(self) -> None:
        """Say that a checkpoint was not finished."""
        self._must_checkpoint = True

    def was_checkpointed(self) -> None:
        """Say that another connection made one."""
        self._must_checkpoint = False
        if self._state is not None:
            self._state.forget_transactions()

    async def run(self, call: Callable[[State], _Value]) -> _Value:
        """What a call returns.

        Raises:
            StateError: when the state cannot be used in time, or in a copy of the process that used
                it; and whatever the call raises.
        """
        if self._process is None:
            self._process = process_mark()
        if self._process != process_mark():
            raise StateError(f"the state {COPIED}")  # a copy has no thread, and would wait for ever
        until = time.monotonic() + BUSY_SECONDS
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._call, call, until)

    async def close(self) -> None:
        """Close the connection; another call opens it again."""
        if self._process is not None and self._process != process_mark():
            self._close()
            return
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)

    def _call(self, call: Callable[[State], _Value], until: float) -> _Value:
        left = until - time.monotonic()
        if left <= 0:
            raise StateError(
                f"the state was busy for {BUSY_SECONDS:.0f} s, most often since another process "
                "holds a lock on it: try again"
            )
        if self._state is None:
            self._state = self._open_state()
            self._waits = BUSY_SECONDS
        if abs(left - self._waits) > _CLOSE_ENOUGH:
            self._state.wait_at_most(left)
            self._waits = left
        return call(self._state)

    def _close(self) -> None:
        if self._state is not None:
            self._state.close()
        self._state = None
