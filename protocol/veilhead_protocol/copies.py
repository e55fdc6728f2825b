"""Whether this process has been copied, and what must not outlive a copy.

After a fork two processes hold the same memory. A zero that was encrypted ahead would be used by
both: two messages under one seed and one key show their difference to everybody. So whatever is
made ahead is used in the process that made it, and only there.

A copy is noticed by a page of memory that the kernel clears in every child (MADV_WIPEONFORK of
madvise(2), Linux 4.14), however the child was made and whatever its process id is. BoringSSL's
crypto/rand/fork_detect.cc does the same. Where there is no such page, by the process id, the time
at which the process started, in hundredths of a second. A snapshot of a virtual machine that is
resumed twice, and a checkpoint of a process that is, cannot be noticed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

_Value = TypeVar("_Value")

_WIPE_ON_FORK: Final = 18  # of linux/mman.h; Python has no name for it
_UNKNOWN_ADVICE: Final = 0x7FFFFFFF

#: Of /proc/self/stat, after the name in brackets: starttime, proc_pid_stat(5).
_START_TIME_FIELD: Final = 19


class _Cell(Protocol):
    """A number above 0, which reads as 0 in a copy of the process that wrote it."""

    value: int


def _cell() -> _Cell:
    """A cell in a page that the kernel clears; where there is no such thing, another one."""
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        page.madvise(_WIPE_ON_FORK)
    except OSError:
        return _ProcessCell()
    try:
        page.madvise(_UNKNOWN_ADVICE)
    except OSError:
        return ctypes.c_uint64.from_buffer(page)  # which keeps the page
    return _ProcessCell()  # an emulator accepts every advice and heeds none


class _ProcessCell:
    """A cell that knows the process which wrote it."""

    def __init__(self) -> None:
        self._value = 0
        self._process = (0, "")

    @property
    def value(self) -> int:
        return self._value if self._process == _this_process() else 0

    @value.setter
    def value(self, value: int) -> None:
        self._process = _this_process()
        self._value = value


def _this_process() -> tuple[int, str]:
    """Process id and start time; without /proc the process id alone."""
    try:
        fields = Path("/proc/self/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return os.getpid(), ""
    return os.getpid(), fields[_START_TIME_FIELD]


class _Watch:
    """Counts how often the memory of this process has been copied on its way here."""

    def __init__(self, cell: _Cell) -> None:
        self._cell = cell
        self._last = 0

    def mark(self) -> int:
        # In this order, threads that come here together after a copy find the same number.
        last = self._last
        found = self._cell.value
        if found == 0:
            found = last + 1
            self._cell.value = found
            self._last = found
        return found


_WATCH: Final = _Watch(_cell())


def process_mark() -> int:
    """A number that is another one in every copy of this process, whatever copied it.

    Something is used in the process that made it as long as the mark is the one that it was made
    under. Reading it takes a fraction of a microsecond.
    """
    return _WATCH.mark()


class MadeAhead(Generic[_Value]):
    """Values made before they are wanted. Each is taken once, in the process that made it."""

    def __init__(self) -> None:
        self._values: list[_Value] = []
        self._process = process_mark()

    def __len__(self) -> int:
        self._forget_copied()
        return len(self._values)

    def add(self, value: _Value) -> None:
        """Keep a value that was made just now."""
        self._forget_copied()
        self._values.append(value)

    def take(self, make: Callable[[], _Value]) -> _Value:
        """One of the values, which is gone from here; a new one when there is none."""
        self._forget_copied()
        return self._values.pop() if self._values else make()

    def clear(self) -> None:
        """Drop them all."""
        self._values.clear()

    def _forget_copied(self) -> None:
        mark = process_mark()
        if self._process != mark:
            self._values.clear()  # whoever else holds them may use them
            self._process = mark


def keep_for_ever(value: Any) -> None:
    """Let nothing end this value, not even the end of the interpreter.

    For what a copied process shares with another: connections, for instance, and the kernel's list
    of those that an event loop waits for, which closing them here would change for both.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
