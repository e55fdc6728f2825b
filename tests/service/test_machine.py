"""What the kernel says that this process may use, read from trees like those of containers."""

from __future__ import annotations

import os

import pytest

from veilhead_service import settings
from veilhead_service.machine import available_bytes, usable_cores

MIB = 2**20


@pytest.fixture
def machine(tmp_path):
    """A root with files of these contents, by path."""

    def write(files):
        for path, content in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(content)
        return tmp_path

    return write


MEMINFO = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {8192 * 1024} kB\n"}


@pytest.fixture
def cores(monkeypatch):
    """A machine of so many cores, all of which this process may run on."""

    def set_cores(count):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))
        monkeypatch.setattr(os, "process_cpu_count", lambda: count, raising=False)

    return set_cores


def test_affinity_counts_and_not_the_machine(tmp_path, cores):
    cores(3)
    assert usable_cores(tmp_path) == 3


def test_the_kernel_is_asked_for_this_process():
    allowed = len(os.sched_getaffinity(0))
    assert 1 <= usable_cores() <= allowed


@pytest.mark.parametrize(
    ("content", "expected"),
    [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 64), ("", 64), ("nonsense", 64)],
)
def test_the_quota_of_a_container_counts(machine, cores, content, expected):
    cores(64)
    root = machine({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": content})
    assert usable_cores(root) == expected


def test_the_quota_of_a_group_around_ours_counts(machine, cores):
    cores(64)
    root = machine(
        {
            "proc/self/cgroup": "0::/pod/service\n",
            "sys/fs/cgroup/pod/service/cpu.max": "max 100000",
            "sys/fs/cgroup/pod/cpu.max": "400000 100000",
        }
    )
    assert usable_cores(root) == 4


@pytest.mark.parametrize("path", ["/docker/abc", "/", "/../other"])
def test_the_quota_of_version_1_counts(machine, cores, path):
    """Below a mount that begins at our own group, its path is not there."""
    cores(64)
    root = machine(
        {
            "proc/self/cgroup": f"4:cpu,cpuacct:{path}\n0::/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        }
    )
    assert usable_cores(root) == 3


def test_no_quota_of_version_1_is_minus_one(machine, cores):
    cores(5)
    root = machine(
        {
            "proc/self/cgroup": "4:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        }
    )
    assert usable_cores(root) == 5


def test_memory_is_what_the_group_has_left(machine):
    root = machine(
        MEMINFO
        | {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": str(1024 * MIB),
            "sys/fs/cgroup/memory.current": str(700 * MIB),
            "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {200 * MIB}\n",
        }
    )
    assert available_bytes(root) == 524 * MIB  # files that were read can go


def test_memory_of_version_1(machine):
    root = machine(
        MEMINFO
        | {
            "proc/self/cgroup": "9:memory:/docker/x\n",
            "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": str(512 * MIB),
            "sys/fs/cgroup/memory/docker/x/memory.usage_in_bytes": str(12 * MIB),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
        }
    )
    assert available_bytes(root) == 500 * MIB


def test_memory_of_the_machine_counts_where_no_group_limits_it(machine):
    root = machine(MEMINFO | {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"})
    assert available_bytes(root) == 8192 * MIB
    assert available_bytes() > 0


def test_where_nothing_is_said_nothing_is_known(tmp_path):
    assert available_bytes(tmp_path) is None


def test_384_cores_start_with_as_many_workers_as_fit(monkeypatch):
    """The default must be a value that the settings accept, too."""
    monkeypatch.setattr(settings, "usable_cores", lambda: 384)
    monkeypatch.setattr(settings, "available_bytes", lambda: 2**40)
    assert settings.Settings().workers == 384
    monkeypatch.setattr(settings, "available_bytes", lambda: 4 * 2**30)
    assert settings.Settings().workers == 4 * 2**30 // (2 * settings.WORKER_BYTES)
    monkeypatch.setattr(settings, "available_bytes", lambda: 0)
    assert settings.Settings().workers == 1
    monkeypatch.setattr(settings, "available_bytes", lambda: None)
    monkeypatch.setattr(settings, "usable_cores", lambda: 5000)
    assert settings.Settings().workers == 1024
