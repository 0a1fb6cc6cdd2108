"""How fast this machine computes and writes, measured for a second each."""

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sqft_export.plan.layout import Layout
from sqft_export.run.processors import sample, used_by_others

if TYPE_CHECKING:
    import torch

MEASURED_SECONDS = 1.0  # of each speed
TOKENS = 512  # rows of the products that are measured
IN_CACHE = 2**16  # elements of two tensors that fit the cache of one core
USUAL_DISK = 5e8  # bytes a second, where it can't be measured


@dataclass(frozen=True)
class Speed:
    """Of a device.

    products: dtype -> multiplications and additions a second, in products of this model's widths.
    elements: elements a second of a multiply-add over float32 in memory.
    memory: free bytes of its own; None where it has none.
    """

    name: str
    products: dict[str, float]
    elements: float
    memory: int | None = None

    def dtype(self, precision: str) -> str:
        """What ``adapt.precision`` comes to, as :func:`run.device.training_dtype` decides it."""
        from sqft_export.run.device import MIN_BFLOAT16_SPEEDUP

        if precision != "auto":
            return precision
        faster = self.products["bfloat16"] > MIN_BFLOAT16_SPEEDUP * self.products["float32"]
        return "bfloat16" if faster else "float32"


@dataclass(frozen=True)
class Speeds:
    """cpu: what runtimes run on. device: what torch computes on, the same where there is no other.
    alone: one thread of the CPU in its own cache, whose speed is that of what goes through files
    alone more than memory's is. disk: bytes a second. others: processors that other processes used
    meanwhile: on a busy machine all speeds are lower than on a quiet one."""

    cpu: Speed
    device: Speed
    alone: Speed
    disk: float
    others: float = 0.0


def measure_speeds(layout: Layout, setting: str) -> Speeds:
    """Measure this machine; the disk by a nameless file in our own cache folder.

    :param setting: ``device`` of a recipe.
    """
    from sqft_export.run.device import CPU, device_of

    device, before = device_of(setting), sample()
    cpu = _speed_of(layout, CPU)
    try:
        disk = _disk_speed()
    except OSError:  # full, or not ours to write to
        disk = USUAL_DISK
    alone = replace(cpu, elements=_one_thread())
    fastest = cpu if device == CPU else _speed_of(layout, device)
    return Speeds(cpu, fastest, alone, disk, used_by_others(before))


def _speed_of(layout: Layout, device: "torch.device") -> Speed:
    import torch

    from sqft_export.run.device import device_memory, device_name, seconds_of

    outputs, inputs = max(layout.linears.values(), key=lambda shape: shape[0] * shape[1])
    products = {}
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.randn(TOKENS, inputs, device=device, dtype=dtype)
        right = torch.randn(outputs, inputs, device=device, dtype=dtype)
        taken = seconds_of(lambda a=left, b=right: a @ b.T, device, MEASURED_SECONDS / 2)  # type: ignore[misc]
        products[str(dtype).removeprefix("torch.")] = 2 * TOKENS * inputs * outputs / taken
    return Speed(device_name(device), products, _elements(device), device_memory(device))


def _elements(device: "torch.device", count: int = 2**24) -> float:
    """:param count: of a tensor; as many as are larger than every cache."""
    import torch

    from sqft_export.run.device import seconds_of

    values = torch.randn(count, device=device)
    result = torch.empty_like(values)  # a fresh one would be placed in memory each time
    taken = seconds_of(
        lambda: torch.mul(values, 1.5, out=result).add_(values), device, MEASURED_SECONDS
    )
    return values.numel() / taken


def _one_thread() -> float:
    import torch

    from sqft_export.run.device import CPU

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _elements(CPU, IN_CACHE)
    finally:
        torch.set_num_threads(threads)


def _disk_speed() -> float:
    from sqft_export.run.device import CPU, seconds_of

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sqft_export"
    cache.mkdir(parents=True, exist_ok=True)
    block = bytes(2**26)
    with tempfile.TemporaryFile(dir=cache) as scratch:

        def write() -> None:
            scratch.seek(0)
            scratch.write(block)
            scratch.flush()

        return len(block) / seconds_of(write, CPU, MEASURED_SECONDS)
