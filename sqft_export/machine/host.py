"""Resources that this process may use on its machine, and texts and errors about them."""

import contextlib
import ctypes
import errno
import importlib.metadata
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
from sqft_export.machine.limits import free_memory, processor_quota

PR_SET_PDEATHSIG = 1
THREADS_VARIABLE = "SQFT_EXPORT_THREADS"  # set by --threads, for this process and its children
MAX_REASON_CHARACTERS = 300  # of a library's message
FLOAT32_MEMORY_SHARE = 0.5  # share of free memory that float32 weights may take


def float32_fits(weights: int) -> bool:
    """Return whether ``weights`` float32 weights may be in memory."""
    return 4 * weights <= FLOAT32_MEMORY_SHARE * free_memory()


def installed(module: str) -> bool:
    """Return whether a module can be imported; only its parent packages are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def distribution_of(module: str) -> importlib.metadata.Distribution:
    """Return the distribution that an installed package is from.

    Builds for other devices have other names, such as ``onnxruntime-gpu``.
    """
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    start = f"{module}/"
    for found in importlib.metadata.distributions(path=[str(Path(spec.origin).parent.parent)]):
        if found.name.replace("-", "_").startswith(module) and any(
            str(file).startswith(start) for file in found.files or ()
        ):
            return found
    return importlib.metadata.distribution(module)


def allowed_processors() -> int:
    """Return the number of processors that this process may use.

    taskset, a container's quota or ``--threads`` can allow fewer than the machine has.
    """
    affinity = hasattr(os, "sched_getaffinity")
    found = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    limit = os.environ.get(THREADS_VARIABLE, "")
    requested = max(1, int(limit)) if limit.isdecimal() else found
    return min(found, processor_quota() or found, requested)


def openmp_threads() -> int:
    """Return the number of threads that OpenMP starts.

    It is the first number of OMP_NUM_THREADS (``4,2`` lists one number per nesting level). If that
    is missing or not a number, OpenMP starts one thread per processor.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else allowed_processors()


def processor_name() -> str:
    """Return the processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def size_text(size: float) -> str:
    """Format bytes in the largest unit that gives a number above 1: 812.0 KiB, 3.4 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


# Messages of native libraries when the system refuses disk space or memory.
DISK_FULL_MESSAGES = ("No space left", "os error 28", "Disk quota exceeded", "File too large")
OUT_OF_MEMORY_MESSAGES = (
    *("not enough memory", "bad_alloc", "can't allocate memory", "Cannot allocate memory"),
    # Accelerators and their libraries: CUDA, Vulkan, WebGPU, ONNX Runtime, OpenCL and OpenVINO.
    *("out of memory", "ALLOC_FAILED", "OUT_OF_MEMORY", "OutOfDeviceMemory", "Out of memory"),
    *("OUT_OF_DEVICE_MEMORY", "Failed to allocate memory", "Device memory allocation"),
    *("CL_MEM_OBJECT_ALLOCATION_FAILURE", "Exceeded max size of memory object allocation"),
)
LESS_MEMORY = "use fewer bits (quantize.bits), a smaller model or --device cpu"
# numpy's message when it could write only a part of a file.
PARTIAL_WRITE = re.compile(r"\d+ requested and \d+ written")


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that the system or an accelerator refused memory."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY_MESSAGES
    )


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Convert errors about disk, memory or permission to one message that names the folder.

    :raises HostError: in place of such an error.
    """
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        if reason := exhausted_resource(error, folder):
            raise HostError(reason) from error
        raise


def exhausted_resource(error: BaseException, folder: Path | None) -> str | None:
    """Return which resource (disk, memory, permission) an error reports as exhausted.

    :param folder: the folder that was written to; None if it is unknown.
    :return: a message, with the free space if it is known; None for any other error.
    """
    text = str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    full = full or bool(PARTIAL_WRITE.fullmatch(text))
    if full or any(words in text for words in DISK_FULL_MESSAGES):
        place = getattr(error, "filename", None) or folder
        return f"no space to write {place or 'a file'}{_free_space_text(place)}"
    if out_of_memory(error):
        reason = " ".join(text.split())[:MAX_REASON_CHARACTERS]
        return f"out of memory: {reason or 'refused by the system'}"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.filename or folder or 'a file'} can't be written: {error.strerror}"
    return None


def _free_space_text(place: object) -> str:
    """Return the free space of the disk that a file was written to, as a message part."""
    if not isinstance(place, str | Path):
        return ""
    return f"; {size_text(shutil.disk_usage(nearest_folder(Path(place))).free)} are free"


def cache_folder() -> Path:
    """Return the folder for files of this package that may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sqft_export"


def nearest_folder(place: Path) -> Path:
    """Return a path if it exists, else its nearest parent that does."""
    existing = place.resolve()
    while not existing.exists():
        existing = existing.parent
    return existing


def write_file(file: Path, text: str, replace: bool = True) -> None:
    """Write a file atomically; a link of that name is replaced, and its target stays unchanged.

    :param replace: replace an existing file; else the existing file is kept.
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


def require_space(place: Path, size: int, advice: str = "") -> None:
    """Check that the disk has space for a file.

    :param place: path that the file will be written to.
    :param size: bytes of the file.
    :param advice: end of the message, such as a setting that helps.
    :raises HostError: if less than ``size`` is free.
    """
    free = shutil.disk_usage(nearest_folder(place)).free
    if free < size:
        raise HostError(f"{place}: {size_text(size)} needed, {size_text(free)} free{advice}")


def die_with_parent(parent: int) -> None:
    """Have the system end this process when its parent process ends.

    :param parent: process id of the parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended before the request
            os._exit(1)
