"""What the system lets this process have: memory and processors of its control groups.

A container's limits (docker ``--memory`` and ``--cpus``, Kubernetes, systemd, Slurm) are those of
its control group and of the groups above it; ``/proc/meminfo`` and the affinity mask show the whole
host. Both versions of control groups are read.
"""

import math
import resource
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/proc/self/cgroup")
MOUNTS = Path("/proc/self/mountinfo")
# A limit that is none: version 1 writes the largest number of pages.
UNLIMITED = 2**62


def free_memory() -> int:
    """Bytes that this process can take without swapping: the least of what the host has available,
    its control groups leave, and its address space (RLIMIT_AS) still holds."""
    import psutil

    found = [int(psutil.virtual_memory().available), *_left_in_groups()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        found.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(found))


def processor_quota() -> int | None:
    """Processors' worth of time that control groups allow, rounded up; None where they set none."""
    shares = [share for folder in _folders("cpu") if (share := _share(folder)) is not None]
    return max(1, math.ceil(min(shares))) if shares else None


def _left_in_groups() -> Iterator[int]:
    for folder in _folders("memory"):
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _number(folder / limit_file), _number(folder / used_file)
            if limit is not None and limit < UNLIMITED:
                yield limit - max(0, (used or 0) - _reclaimable(folder))


def _reclaimable(folder: Path) -> int:
    """Bytes of files in memory that a group gives back before it refuses any."""
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            return int(value)
    return 0


def _share(folder: Path) -> float | None:
    """Processors' worth of one group: quota over period."""
    both = " ".join(_lines(folder / "cpu.max")).split()
    if len(both) == 2 and both[0].isdecimal():
        return int(both[0]) / int(both[1])
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota and quota > 0 and period else None


def _folders(controller: str) -> Iterator[Path]:
    """Folders of this process's group and of those above it, as far as they are mounted here."""
    for line in _lines(GROUPS):
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        for root, mount in _mounts(controller if names else ""):
            # In a container that sees the host's tree the path starts with what is mounted.
            inside = path.removeprefix(root.rstrip("/")).strip("/")
            folder = mount / inside
            while folder != mount.parent:
                yield folder
                folder = folder.parent


def _mounts(controller: str) -> Iterator[tuple[str, Path]]:
    """Group at the root of a mount, and where it is mounted.

    :param controller: of version 1; empty: version 2, which has all in one tree.
    """
    for line in _lines(MOUNTS):
        before, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        place = before.split(" ")
        one = kind == "cgroup" and controller and controller in options.split(" ")[-1].split(",")
        if one or (kind == "cgroup2" and not controller):
            yield place[3], Path(place[4])


def _number(file: Path) -> int | None:
    """The number that a file holds; None for ``max``, and without the file."""
    text = " ".join(_lines(file)).strip()
    return int(text) if text.lstrip("-").isdecimal() else None


def _lines(file: Path) -> list[str]:
    """Lines of a file of the system; none where there is no such file, or it can't be read."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
