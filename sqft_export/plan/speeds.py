"""How fast this machine computes and writes, measured for a second each."""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

MEASURED_SECONDS = 1.0  # of each speed


@dataclass(frozen=True)
class Speeds:
    """flops: of a float32 matrix product; elements: of a multiply-add over float32 in memory;
    disk: bytes; each a second."""

    flops: float
    elements: float
    disk: float


def measure_speeds(folder: Path) -> Speeds:
    """Measure this machine.

    :param folder: on the disk that is written to.
    """
    import torch

    def usual(work) -> float:
        taken: list[float] = []
        while sum(taken) < MEASURED_SECONDS:
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
        return median(taken)

    left, right = torch.randn(512, 4096), torch.randn(4096, 4096)
    flops = 2 * 512 * 4096 * 4096 / usual(lambda: left @ right)
    values = torch.randn(2**24)
    elements = values.numel() / usual(lambda: values.mul(1.5).add_(values))
    scratch, block = nearest_existing(folder) / ".speed", bytes(2**26)

    def write() -> None:
        scratch.write_bytes(block)

    try:
        disk = len(block) / usual(write)
    finally:
        scratch.unlink(missing_ok=True)
    return Speeds(flops, elements, disk)


def nearest_existing(folder: Path) -> Path:
    """A folder, or the nearest above it that is there."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    return place
