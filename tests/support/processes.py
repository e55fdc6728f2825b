"""What the operating system knows of the processes that a service has started."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def _parent(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def workers_of(parent=None):
    """Evaluating processes that this process, or another, has started and that run."""
    parent = os.getpid() if parent is None else parent
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _parent(entry.name) == parent:
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"veilhead_service.worker" in command:
                found.add(int(entry.name))
    return found


def freeze(pid):
    """Stop a process, and return once it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TtZ":
        pass
