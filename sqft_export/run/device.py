"""Where torch computes: the one place that decides, and what it knows of that device."""

import functools
import time
from collections.abc import Callable
from statistics import median

import torch

from sqft_export.errors import UserError

CPU = torch.device("cpu")
FASTER = 1.2  # times as fast, and bfloat16 is taken


def device_of(setting: str) -> torch.device:
    """``device`` of a recipe as a device of this machine.

    :param setting: auto: torch's accelerator where there is one, else the CPU; or its name.
    :raises UserError: if it is not here, with what is.
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


def device_name(device: torch.device) -> str:
    """What people and manifests call it."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return device.type


def device_memory(device: torch.device) -> int | None:
    """Bytes that are free on an accelerator; None where torch can't tell."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def seconds_of(work: Callable[[], object], device: torch.device, at_least: float) -> float:
    """The median of as many calls as take that many seconds, after one that is not counted."""
    taken: list[float] = []
    work()
    while sum(taken) < at_least:
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - started)
    return median(taken)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@functools.cache
def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether matrix products are faster in bfloat16 than in float32, measured.

    In turn, and by the best of each: other work on the machine slows down single calls tenfold.
    """
    factors = torch.randn(2, 512, 1024, device=device)
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    for _ in range(5):
        for dtype in best:
            left, right = factors.to(dtype)
            taken = seconds_of(lambda a=left, b=right: a @ b.T, device, 0.01)  # type: ignore[misc]
            best[dtype] = min(best[dtype], taken)
    return best[torch.float32] > FASTER * best[torch.bfloat16]


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """``adapt.precision`` as a dtype."""
    if precision == "auto":
        return torch.bfloat16 if fast_in_bfloat16(device) else torch.float32
    return getattr(torch, precision)
