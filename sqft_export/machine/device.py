"""Choose the device that torch computes on, and measure it."""

import functools
import time
from collections.abc import Callable
from statistics import median

import torch

from sqft_export.errors import UserError
from sqft_export.machine.launcher import local_rank, process_count

CPU = torch.device("cpu")
MIN_BFLOAT16_SPEEDUP = 1.2  # over float32; below it float32 is used


def device_of(setting: str) -> torch.device:
    """Return the torch device for a recipe's ``device``.

    :param setting: a device's name, or ``auto``: torch's accelerator if there is one, else the CPU.
    :raises UserError: if this machine lacks the device; lists the devices it has.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if setting == "cpu" or (setting == "auto" and found is None):
        return CPU
    if found is None or setting not in ("auto", found.type):
        here = ", ".join(["auto", "cpu", *([found.type] if found else [])])
        raise UserError(
            f"device: found {setting}, which torch {torch.__version__} does not reach here; "
            f"allowed are {here}"
        )
    return found


def use_own_accelerator() -> None:
    """Let every process of a launcher on this machine compute on another accelerator."""
    if process_count() > 1 and (count := torch.accelerator.device_count()):
        torch.accelerator.set_device_index(local_rank() % count)


def device_name(device: torch.device) -> str:
    """Return the device's name for messages and manifests."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return device.type


def device_memory(device: torch.device) -> int | None:
    """Return the free bytes of an accelerator; None if torch can't query them."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def seconds_of(work: Callable[[], object], device: torch.device, at_least: float) -> float:
    """Return the median seconds of a call of ``work``, after one warm-up call.

    :param at_least: seconds; calls repeat until they took so long in total.
    """
    taken: list[float] = []
    work()
    while sum(taken) < at_least:
        _synchronize(device)
        started = time.perf_counter()
        work()
        _synchronize(device)
        taken.append(time.perf_counter() - started)
    return median(taken)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@functools.cache
def fast_in_bfloat16(device: torch.device) -> bool:
    """Measure whether matrix products are faster in bfloat16 than in float32.

    The dtypes alternate, and the best time of each counts: other programs on the machine slow down
    single calls tenfold.
    """
    factors = torch.randn(2, 512, 1024, device=device)
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    for _ in range(5):
        for dtype in best:
            left, right = factors.to(dtype)
            taken = seconds_of(lambda a=left, b=right: a @ b.T, device, 0.01)  # type: ignore[misc]
            best[dtype] = min(best[dtype], taken)
    return best[torch.float32] > MIN_BFLOAT16_SPEEDUP * best[torch.bfloat16]


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype for a recipe's ``adapt.precision``; ``auto`` measures."""
    if precision == "auto":
        return torch.bfloat16 if fast_in_bfloat16(device) else torch.float32
    return getattr(torch, precision)
