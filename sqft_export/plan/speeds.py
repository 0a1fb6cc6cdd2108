"""How fast this machine computes and writes, measured for a second each."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

MEASURED_SECONDS = 1.0  # of each speed
USUAL_DISK = 5e8  # bytes a second, where it can't be measured


@dataclass(frozen=True)
class Speeds:
    """flops: of a float32 matrix product; elements: of a multiply-add over float32 in memory;
    disk: bytes; each a second."""

    flops: float
    elements: float
    disk: float


def measure_speeds() -> Speeds:
    """Measure this machine; the disk by a nameless file in our own cache folder."""
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
    try:
        disk = _disk_speed(usual)
    except OSError:  # full, or not ours to write to
        disk = USUAL_DISK
    return Speeds(flops, elements, disk)


def _disk_speed(usual: Callable[[Callable[[], None]], float]) -> float:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sqft_export"
    cache.mkdir(parents=True, exist_ok=True)
    block = bytes(2**26)
    with tempfile.TemporaryFile(dir=cache) as scratch:

        def write() -> None:
            scratch.seek(0)
            scratch.write(block)
            scratch.flush()

        return len(block) / usual(write)


def nearest_existing(folder: Path) -> Path:
    """A folder, or the nearest above it that is there."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    return place
