"""What this process may use of its machine, and sizes as people read them."""

import contextlib
import ctypes
import errno
import importlib.util
import os
import platform
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from sqft_export.errors import HostError
from sqft_export.run.limits import free_memory, processor_quota

PR_SET_PDEATHSIG = 1
THREADS = "SQFT_EXPORT_THREADS"  # set by --threads, for this process and its children
LONGEST_REASON = 300  # characters of what a library says
FLOAT32_ROOM = 0.5  # share of the free memory that float32 weights may take


def float32_fits(weights: int) -> bool:
    """Whether so many weights may be in memory as float32."""
    return 4 * weights <= FLOAT32_ROOM * free_memory()


def installed(module: str) -> bool:
    """Whether a module can be imported; only its parents are."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def allowed_processors() -> int:
    """Processors this process may run on: fewer than there are under taskset, in a container, or
    where ``--threads`` says so."""
    affinity = hasattr(os, "sched_getaffinity")
    found = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    limit = os.environ.get(THREADS, "")
    asked = max(1, int(limit)) if limit.isdecimal() else found
    return min(found, processor_quota() or found, asked)


def openmp_threads() -> int:
    """Threads that OpenMP starts: by OMP_NUM_THREADS, whose first number is the outermost level's
    (``4,2``); one per processor without it, or where it is no number."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else allowed_processors()


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
NO_MEMORY = (
    *("not enough memory", "bad_alloc", "can't allocate memory", "Cannot allocate memory"),
    *("out of memory", "ALLOC_FAILED", "OUT_OF_MEMORY"),  # of accelerators and their libraries
)
# What numpy says of a file that it could write in part alone.
WRITTEN_IN_PART = re.compile(r"\d+ requested and \d+ written")


def out_of_memory(error: BaseException) -> bool:
    """Whether the system, or an accelerator, refused memory."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn an error for want of disk, memory or permission into one message that names the folder.

    :raises HostError: in place of such an error.
    """
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        if reason := lacking(error, folder):
            raise HostError(reason) from error
        raise


def lacking(error: BaseException, folder: Path | None) -> str | None:
    """What of the machine an error is for want of, with what there is; None if of nothing.

    :param folder: what was being written to; None where that is not known.
    """
    text = str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    full = full or bool(WRITTEN_IN_PART.fullmatch(text))
    if full or any(words in text for words in NO_SPACE):
        place = getattr(error, "filename", None) or folder
        return f"no space to write {place or 'a file'}{_free_text(place)}"
    if out_of_memory(error):
        return (
            f"out of memory: {' '.join(text.split())[:LONGEST_REASON] or 'refused by the system'}"
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.filename or folder or 'a file'} can't be written: {error.strerror}"
    return None


def _free_text(place: object) -> str:
    """What is free where a file was to be written."""
    if not isinstance(place, str | Path):
        return ""
    return f"; {size_text(shutil.disk_usage(nearest_folder(Path(place))).free)} are free"


def nearest_folder(place: Path) -> Path:
    """A place, or the nearest above it that exists."""
    there = place.resolve()
    while not there.exists():
        there = there.parent
    return there


def write_file(file: Path, text: str, replace: bool = True) -> None:
    """Write a file whole or not at all; what a link of its name leads to is left as it is.

    :param replace: whether it takes the place of one that is there, or that one is kept.
    """
    temporary = file.with_name(f".{file.name}.{platform.node()}-{os.getpid()}")
    try:
        temporary.write_text(text)
        if replace:
            temporary.replace(file)
        else:
            file.hardlink_to(temporary)
    except FileExistsError:
        pass
    finally:
        temporary.unlink(missing_ok=True)


def require_space(place: Path, size: int, way_out: str = "") -> None:
    """:raises HostError: if the disk that a file is to be written to has less than its size."""
    free = shutil.disk_usage(nearest_folder(place)).free
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
