"""What this process may use of its machine, and sizes as people read them."""

import ctypes
import errno
import importlib.util
import os
import platform
import shutil
import signal
import sys
from pathlib import Path

from sqft_export.errors import HostError

PR_SET_PDEATHSIG = 1
THREADS = "SQFT_EXPORT_THREADS"  # set by --threads, for this process and its children
FLOAT32_ROOM = 0.5  # share of the free memory that float32 weights may take


def float32_fits(weights: int) -> bool:
    """Whether so many weights may be in memory as float32."""
    import psutil

    return 4 * weights <= FLOAT32_ROOM * psutil.virtual_memory().available


def installed(module: str) -> bool:
    """Whether a module can be imported; only its parents are."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def allowed_processors() -> int:
    """Processors this process may run on: fewer than there are under taskset or in a container, or
    where ``--threads`` says so."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    limit = os.environ.get(THREADS, "")
    return min(count, max(1, int(limit))) if limit.isdecimal() else count


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def size_text(size: float) -> str:
    """Bytes in the largest unit that leaves a number above 1: 812.0 KiB, 3.4 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


# What native libraries say when the system refuses them something.
NO_SPACE = ("No space left", "os error 28", "Disk quota exceeded", "File too large")
NO_MEMORY = ("not enough memory", "bad_alloc", "can't allocate memory", "Cannot allocate memory")


def lacking(error: BaseException, folder: Path) -> str | None:
    """What of the machine an error is for want of, with what there is; None if of nothing.

    :param folder: what was being written to.
    """
    text = str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or any(words in text for words in NO_SPACE):
        free = size_text(shutil.disk_usage(folder).free)
        return f"no space to write {getattr(error, 'filename', None) or folder}; {free} are free"
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        return f"out of memory: {text or 'refused by the system'}"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.filename or folder} can't be written: {error.strerror}"
    return None


def require_space(place: Path, size: int, way_out: str = "") -> None:
    """:raises HostError: if the disk that a file is to be written to has less than its size."""
    there = place.resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < size:
        raise HostError(f"{place}: {size_text(size)} needed, {size_text(free)} free{way_out}")


def die_with_parent(parent: int) -> None:
    """Have this process end when the one that started it does, however that ends.

    :param parent: its process id.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before this was asked for
            os._exit(1)
