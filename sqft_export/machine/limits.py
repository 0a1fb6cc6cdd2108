"""Read the memory and processor limits of this process and its control groups (cgroups).

A container's limits (docker ``--memory`` and ``--cpus``, Kubernetes, systemd, Slurm) are set on
its control group and the parent groups. ``/proc/meminfo`` and the affinity mask show the whole
host. Versions 1 and 2 of control groups are read.
"""

import math
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUP_FILE = Path("/proc/self/cgroup")
MOUNTS_FILE = Path("/proc/self/mountinfo")
MEMINFO_FILE = Path("/proc/meminfo")
STATM_FILE = Path("/proc/self/statm")  # sizes of this process in pages
KIB = 1024
PAGE_BYTES = mmap.PAGESIZE
# From this size on there is no limit: version 1 then reports the largest number of pages.
UNLIMITED_BYTES = 2**62


def free_memory() -> int:
    """Return the bytes that this process can allocate without swapping.

    This is the smallest of the host's available memory, the unused memory of its control groups
    and the unused address space (RLIMIT_AS).
    """
    found = [_host_memory(), *_unused_group_memory()]
    if sys.platform != "win32":
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            found.append(limit - _address_space())
    return max(0, min(found))


def _host_memory() -> int:
    """Return the bytes that the host can give without swapping; without Linux, its memory."""
    for line in _lines(MEMINFO_FILE):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * KIB
    if sys.platform == "win32":
        import psutil

        return int(psutil.virtual_memory().available)
    return PAGE_BYTES * os.sysconf("SC_PHYS_PAGES")


def _address_space() -> int:
    """Return the bytes of this process's address space; 0 without Linux."""
    sizes = " ".join(_lines(STATM_FILE)).split()
    return int(sizes[0]) * PAGE_BYTES if sizes else 0


def processor_quota() -> int | None:
    """Return the CPU quota of the control groups in processors, rounded up; None if unlimited."""
    shares = [
        share for folder in _group_folders("cpu") if (share := _cpu_quota(folder)) is not None
    ]
    return max(1, math.ceil(min(shares))) if shares else None


def _unused_group_memory() -> Iterator[int]:
    """Yield the bytes that each control group with a limit still allows."""
    for folder in _group_folders("memory"):
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _number(folder / limit_file), _number(folder / used_file)
            if limit is not None and limit < UNLIMITED_BYTES:
                yield limit - max(0, (used or 0) - _reclaimable(folder))


def _reclaimable(folder: Path) -> int:
    """Return the bytes of file cache that a group frees before it refuses memory."""
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            return int(value)
    return 0


def _cpu_quota(folder: Path) -> float | None:
    """Return the CPU quota of one group in processors: quota divided by period."""
    both = " ".join(_lines(folder / "cpu.max")).split()
    if len(both) == 2 and both[0].isdecimal():
        return int(both[0]) / int(both[1])
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota and quota > 0 and period else None


def _group_folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and its parent groups that are mounted."""
    for line in _lines(CGROUP_FILE):
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        for root, mount in _mounts(controller if names else ""):
            # If a container sees the host's paths, the path starts with the mounted group.
            inside = path.removeprefix(root.rstrip("/")).strip("/")
            folder = mount / inside
            while folder != mount.parent:
                yield folder
                folder = folder.parent


def _mounts(controller: str) -> Iterator[tuple[str, Path]]:
    """Yield the group at the root of each mount, and the mount point.

    :param controller: a controller of version 1; empty: version 2, which has a single tree.
    """
    for line in _lines(MOUNTS_FILE):
        before, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        place = before.split(" ")
        one = kind == "cgroup" and controller and controller in options.split(" ")[-1].split(",")
        if one or (kind == "cgroup2" and not controller):
            yield place[3], Path(place[4])


def _number(file: Path) -> int | None:
    """Return the number in a file; None for ``max`` or a missing file."""
    text = " ".join(_lines(file)).strip()
    return int(text) if text.lstrip("-").isdecimal() else None


def _lines(file: Path) -> list[str]:
    """Return the lines of a system file; empty if it is missing or can't be read."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
