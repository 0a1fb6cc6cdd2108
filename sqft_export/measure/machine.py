"""What a number was measured on, and what the process that measured took."""

import os
import platform
import resource
from pathlib import Path
from typing import Any

from sqft_export.run.host import installed

CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd")


def machine_facts() -> dict[str, Any]:
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


def _status(field: str) -> int | None:
    """Bytes that the kernel tells of this process; None where it has no such file."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_memory() -> int:
    """Peak resident bytes of this process since it was started."""
    # Not ru_maxrss where it can be helped: Linux carries the parent's peak over into it.
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_now() -> int:
    """Resident bytes of this process."""
    return _status("VmRSS") or peak_memory()
