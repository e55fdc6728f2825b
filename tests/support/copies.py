"""Copies of this process, made in every way in which one can be copied, and never waited for long.

A copy gives what it found through a pipe and ends at once, without the end of an interpreter. One
that gives nothing in time is killed, and the test fails.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import platform
import select
import signal
import sys
import time
import warnings

import pytest

_SYS_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE_NEWPID = 0x20000000

#: Ways of copying; in the last, the process id of the copy is that of the process it is copied
#: from, if that one is such a copy itself.
WAYS = ("fork", "clone", "namespace")


def copy_process(way):
    """0 in the copy, and its process id where it was copied; the test is skipped if forbidden."""
    if way == "fork":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # there are other threads
            return os.fork()
    if platform.machine() not in _SYS_CLONE:
        pytest.skip(f"the number of clone(2) on {platform.machine()} is not known here")
    flags = signal.SIGCHLD | (_CLONE_NEWPID if way == "namespace" else 0)
    # Not CDLL, which lets go of the interpreter's lock: in the copy its next holder may not exist.
    system = ctypes.PyDLL(None, use_errno=True)
    interval = sys.getswitchinterval()
    # Nor may the copy be asked to hand the lock over: Python, which knows of no copy, would wait
    # until somebody has taken it.
    sys.setswitchinterval(1000)
    time.sleep(0.02)  # those who wait for it already ask within 5 milliseconds
    pid = system.syscall(_SYS_CLONE[platform.machine()], flags, 0, 0, 0, 0)
    sys.setswitchinterval(interval)
    if pid < 0:
        pytest.skip(f"clone(2) is refused: {os.strerror(ctypes.get_errno())}")
    return pid


def in_copy(way, work, *, seconds=30.0):
    """What `work()` gives in a copy of this process; what it raises there is raised here."""
    reader, writer = os.pipe()
    pid = copy_process(way)
    if pid == 0:
        try:
            try:
                found = True, work()
            except BaseException as error:
                found = False, error
            os.close(reader)
            with os.fdopen(writer, "wb") as stream:
                pickle.dump(found, stream)
        finally:
            os._exit(0)
    os.close(writer)
    try:
        data = _read(reader, time.monotonic() + seconds)
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    is_value, found = pickle.loads(data)  # noqa: S301
    if is_value:
        return found
    raise found


def in_copy_of_same_id(work, *, seconds=30.0):
    """As `in_copy` of `work("namespace")`, which copies itself to a process of the same id."""

    def first():
        if os.getpid() != 1:
            raise AssertionError(f"got the process id {os.getpid()}, expected 1")
        return work("namespace")

    return in_copy("namespace", first, seconds=seconds)


def in_every_way(way, work):
    """`work(way)`, for `same-id` in a process whose copies have its own id."""
    return in_copy_of_same_id(work) if way == "same-id" else work(way)


def _read(reader, deadline):
    pieces = []
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError("a copy of this process hangs")
        piece = os.read(reader, 2**16)
        if not piece:
            if not pieces:
                raise AssertionError("a copy of this process died")
            return b"".join(pieces)
        pieces.append(piece)
