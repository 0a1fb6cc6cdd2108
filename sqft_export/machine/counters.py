"""Describe the machine of a measurement; read energy and memory counters."""

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqft_export.documents import Document
from sqft_export.machine.host import installed

NVML_DEVICES = ("gpu", "cuda")  # kinds of devices that NVML reports
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd")


class MachineFacts(Document):
    """Processor, its vector extensions, cores, memory, operating system and Python version."""

    processor: str
    features: list[str]
    cores: int
    memory_bytes: int
    system: str
    python: str


def machine_facts() -> MachineFacts:
    """Describe this machine."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()
    return MachineFacts(
        processor=fields.get("model name") or platform.processor() or platform.machine(),
        features=[name for name in CPU_FEATURES if name in flags],
        cores=os.cpu_count() or 1,
        memory_bytes=_total_memory(),
        system=platform.platform(),
        python=platform.python_version(),
    )


def _total_memory() -> int:
    """Return the bytes of this machine's memory."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.virtual_memory().total)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def energy_joules(device: str = "cpu") -> float | None:
    """Return the energy counter of a device in joules; None if it cannot be read.

    Only differences of two readings have a meaning.

    :param device: ``gpu``, ``cuda``: all NVIDIA GPUs through NVML (needs nvidia-ml-py). ``cpu``,
        ``npu``: the processor packages through RAPL. Others have no counter.
    """
    if device in NVML_DEVICES:
        joules = _read_nvml(lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu))
        return None if joules is None else joules / 1e3
    if device in ("vulkan", "webgpu"):  # of any vendor; there is no common counter
        return None
    counters = sorted(Path("/sys/class/powercap").glob("intel-rapl:[0-9]/energy_uj"))
    try:
        return sum(int(counter.read_text()) for counter in counters) / 1e6 if counters else None
    except PermissionError:  # only root may read it
        return None


def device_memory(device: str) -> int | None:
    """Return the used bytes of a device's memory; None if they cannot be read.

    They include other processes. CUDA's runtimes keep freed memory, so that the difference of a
    reading before a model is loaded and one after its passes is the largest amount that it used.

    :param device: ``gpu``, ``cuda``: all NVIDIA GPUs through NVML (needs nvidia-ml-py).
    """
    if device not in NVML_DEVICES:
        return None
    return _read_nvml(lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used)


def _read_nvml(read: Callable[[Any, Any], int]) -> int | None:
    """Return the sum of a value of all NVIDIA GPUs; None without NVML or the value.

    :param read: takes the module ``pynvml`` and the handle of a GPU.
    """
    if not installed("pynvml"):
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        gpus = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        found = [read(pynvml, gpu) for gpu in gpus]
    except pynvml.NVMLError:  # no driver, or a GPU without this value
        return None
    return sum(found) if found else None


def _status(field: str) -> int | None:
    """Return a field of /proc/self/status in bytes; None if the file does not exist."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_memory() -> int:
    """Return the peak resident bytes of this process since its start."""
    return _status("VmHWM") or _peak_without_proc()


def _peak_without_proc() -> int:
    """Return the peak resident bytes on macOS and Windows, which have no ``/proc``."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_now() -> int:
    """Return the current resident bytes of this process."""
    return _status("VmRSS") or peak_memory()
