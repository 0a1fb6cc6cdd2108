"""Measured speeds of this machine: products, memory and disk, 0.25 s per speed."""

import tempfile
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sqft_export.machine.host import cache_folder
from sqft_export.machine.processors import sample, used_by_others
from sqft_export.plan.layout import Layout

if TYPE_CHECKING:
    import torch

MEASURED_SECONDS = 0.25  # per speed, after one call to warm up
PRODUCT_ROWS = 512  # tokens in the measured matrix product
MAX_CPU_OUTPUTS = 1024  # of that product; a wider one is not faster, but takes seconds
CACHED_ELEMENTS = 2**16  # two tensors of this size fit the cache of one core
DEFAULT_DISK_SPEED = 5e8  # bytes per second, if the disk cannot be measured


@dataclass(frozen=True)
class Speed:
    """Measured speed of one device.

    products: dtype -> FLOPs per second of matrix products with this model's widths.
    elements: elements per second of a multiply-add over float32 in memory.
    memory: free bytes of the device's own memory; None if it uses the host's.
    """

    name: str
    products: dict[str, float]
    elements: float
    memory: int | None = None

    def dtype(self, precision: str) -> str:
        """Return the dtype for ``adapt.precision``, like :func:`machine.device.training_dtype`."""
        from sqft_export.machine.device import MIN_BFLOAT16_SPEEDUP

        if precision != "auto":
            return precision
        faster = self.products["bfloat16"] > MIN_BFLOAT16_SPEEDUP * self.products["float32"]
        return "bfloat16" if faster else "float32"


@dataclass(frozen=True)
class Speeds:
    """Measured speeds of this machine.

    cpu: all threads; runtimes use it.
    device: device of torch; equal to ``cpu`` without an accelerator.
    one_thread: one CPU thread with data in its cache; predicts passes that only rewrite files.
    disk: bytes per second.
    others: processors that other processes used during the measurement. They lower all speeds.
    """

    cpu: Speed
    device: Speed
    one_thread: Speed
    disk: float
    others: float = 0.0


def measure_speeds(layout: Layout, setting: str) -> Speeds:
    """Measure this machine; the disk with a temporary file in this package's cache folder.

    :param setting: ``device`` of a recipe.
    """
    from sqft_export.machine.device import CPU, device_of

    device, before = device_of(setting), sample()
    cpu = _measure_device(layout, CPU)
    try:
        disk = _measure_disk()
    except OSError:  # full or not writable
        disk = DEFAULT_DISK_SPEED
    one_thread = replace(cpu, elements=_measure_one_thread())
    accelerator = cpu if device == CPU else _measure_device(layout, device)
    return Speeds(cpu, accelerator, one_thread, disk, used_by_others(before))


def _measure_device(layout: Layout, device: "torch.device") -> Speed:
    import torch

    from sqft_export.machine.device import device_memory, device_name, seconds_of

    outputs, inputs = max(layout.linears.values(), key=lambda shape: shape[0] * shape[1])
    outputs = min(outputs, MAX_CPU_OUTPUTS) if device.type == "cpu" else outputs
    products = {}
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.randn(PRODUCT_ROWS, inputs, device=device, dtype=dtype)
        right = torch.randn(outputs, inputs, device=device, dtype=dtype)
        taken = seconds_of(lambda a=left, b=right: a @ b.T, device, MEASURED_SECONDS / 2)  # type: ignore[misc]
        products[str(dtype).removeprefix("torch.")] = 2 * PRODUCT_ROWS * inputs * outputs / taken
    return Speed(device_name(device), products, _measure_elements(device), device_memory(device))


def _measure_elements(device: "torch.device", count: int = 2**24) -> float:
    """Return the elements per second of a multiply-add.

    :param count: elements of a tensor; the default exceeds every cache.
    """
    import torch

    from sqft_export.machine.device import seconds_of

    values = torch.randn(count, device=device)
    result = torch.empty_like(values)  # a new tensor per call would add page faults
    taken = seconds_of(
        lambda: torch.mul(values, 1.5, out=result).add_(values), device, MEASURED_SECONDS
    )
    return values.numel() / taken


def _measure_one_thread() -> float:
    import torch

    from sqft_export.machine.device import CPU

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure_elements(CPU, CACHED_ELEMENTS)
    finally:
        torch.set_num_threads(threads)


def _measure_disk() -> float:
    from sqft_export.machine.device import CPU, seconds_of

    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    block = bytes(2**26)
    with tempfile.TemporaryFile(dir=cache) as scratch:

        def write() -> None:
            scratch.seek(0)
            scratch.write(block)
            scratch.flush()

        return len(block) / seconds_of(write, CPU, MEASURED_SECONDS)
