"""What a process that serves asks of the operating system for itself."""

from __future__ import annotations

import ctypes
import resource
import sys
from typing import Final

#: prctl(2), linux/prctl.h: a core dump that is piped to a program ignores RLIMIT_CORE.
_PR_SET_DUMPABLE: Final = 4


def forbid_core_dumps() -> None:
    """Never write this process's memory to a file when it crashes.

    Memory holds private weights. For the whole process and its children: call it only in a process
    that is the service's own.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def raise_descriptor_limit() -> int:
    """Let this process and its children open as many files as it may; how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
