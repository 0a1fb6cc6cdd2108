"""What a number was measured on."""

import ctypes
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd")


def describe() -> dict[str, Any]:
    """Processor, its vector features, cores, memory, operating system."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "features": [name for name in CPU_FEATURES if name in flags],
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def energy_joules(device: str = "cpu") -> float | None:
    """Energy that a device has used since some moment; None where the machine does not tell.

    :param device: gpu: all NVIDIA GPUs, by NVML where nvidia-ml-py is installed; else the processor
        packages, by RAPL.
    """
    if device == "gpu":
        return _gpu_joules()
    counters = sorted(Path("/sys/class/powercap").glob("intel-rapl:[0-9]/energy_uj"))
    try:
        return sum(int(counter.read_text()) for counter in counters) / 1e6 if counters else None
    except PermissionError:  # root alone may read it
        return None


def _gpu_joules() -> float | None:
    if not installed("pynvml"):
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        gpus = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, gpus)) / 1e3
    except pynvml.NVMLError:  # no driver, or a GPU that does not count
        return None


def installed(module: str) -> bool:
    """Whether a module can be imported; only its parents are."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def release_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps what lies below a piece still in use: where small tensors stay and large ones come
    and go, as in an export, that grows to as much again as what stays.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def process_rank() -> int:
    """Number of this process under a launcher (``torchrun``, ``accelerate launch``); 0 writes."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
