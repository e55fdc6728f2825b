"""What this process may use of the machine: cores and memory, as the kernel limits them.

A container sees every core and all memory of its host; what it may use is in its control groups,
cgroups(7), of version 2 or 1. A group's own limit and those of the groups around it all hold, so
the lowest counts. What cannot be read limits nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

#: Where the groups of each version are mounted, below the root.
_MOUNT: Final = "sys/fs/cgroup"

#: Version 1 writes a number near 2^63 where there is no limit.
_NO_LIMIT: Final = 2**60

_ROOT: Final = Path("/")


def usable_cores(root: Path = _ROOT) -> int:
    """Cores that this process may keep busy, at least one: its affinity and its groups' quota.

    Args:
        root: where `proc` and `sys` are.
    """
    counted = getattr(os, "process_cpu_count", None)  # Python 3.13
    cores = (counted() if counted is not None else len(os.sched_getaffinity(0))) or 1
    quotas = [*_quotas_v2(root), *_quotas_v1(root)]
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas)]))


def available_bytes(root: Path = _ROOT) -> int | None:
    """Memory that may still be taken: what the machine has, or less where a group has less left.

    None when nothing says how much that is.
    """
    found = [*_left_v2(root), *_left_v1(root)]
    machine = _fields(root / "proc/meminfo").get("MemAvailable")
    if machine is not None:
        found.append(machine * 1024)
    return max(0, min(found)) if found else None


def _quotas_v2(root: Path) -> Iterator[float]:
    for group in _groups(root, ""):
        words = _read(group / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit() and int(words[1]) > 0:
            yield int(words[0]) / int(words[1])


def _quotas_v1(root: Path) -> Iterator[float]:
    for group in _groups(root, "cpu"):
        quota = _number(group / "cpu.cfs_quota_us")
        period = _number(group / "cpu.cfs_period_us")
        if quota is not None and quota > 0 and period:
            yield quota / period


def _left_v2(root: Path) -> Iterator[int]:
    for group in _groups(root, ""):
        yield from _left(group, "memory.max", "memory.current", "inactive_file")


def _left_v1(root: Path) -> Iterator[int]:
    for group in _groups(root, "memory"):
        yield from _left(
            group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        )


def _left(group: Path, limit_file: str, used_file: str, cache: str) -> Iterator[int]:
    limit, used = _number(group / limit_file), _number(group / used_file)
    if limit is not None and limit < _NO_LIMIT:
        # Files that were read and are not in use are counted, and given up when memory is wanted.
        yield limit - (used or 0) + _fields(group / "memory.stat").get(cache, 0)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """This process's group of a controller and those around it; version 2 is the empty name."""
    mount = root / _MOUNT / controller
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = (*line.split(":", 2), "", "")[:3]
        if controller not in names.split(","):
            continue
        group = mount / path.lstrip("/")
        # In a container the mount may begin at its own group, whose path is then of no use here.
        if ".." in group.parts or not group.is_dir():
            group = mount
        while group != mount:
            yield group
            group = group.parent
        yield mount


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.removeprefix("-").isdigit() else None


def _fields(path: Path) -> dict[str, int]:
    """The lines `name number` or `name: number kB` of a file."""
    found = {}
    for line in _read(path).splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdigit():
            found[words[0].rstrip(":")] = int(words[1])
    return found
