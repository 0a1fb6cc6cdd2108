"""Processors that other processes leave free, and the number of threads that compute here.

OpenMP's threads wait for each other after every operation. Where one of them shares its processor
with another program all others wait for it, and by default they spin, which slows it down further.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from sqft_export.errors import UserError
from sqft_export.run.host import THREADS, allowed_processors

STAT = Path("/proc/stat")
SAMPLE_SECONDS = 0.25
BUSY = 0.25  # processors that others use; with fewer a machine counts as quiet
OPENMP_THREADS = "OMP_NUM_THREADS"
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # how OpenMP's threads wait
SPIN_COUNT = "10000"  # tens of microseconds; libgomp's default is a millisecond or more
THREADS_FILE = ".threads"  # in the folder of a run: how many compute there
_set_here: set[str] = set()


@dataclass(frozen=True)
class Sample:
    """Seconds until a moment: ``at`` of a clock, ``busy`` of all processors that this process may
    run on, ``own`` of this process and of its children that have ended."""

    at: float
    busy: float
    own: float


def sample() -> Sample | None:
    """None where the system does not tell."""
    try:
        text = STAT.read_text()
    except OSError:
        return None
    ticks = busy_ticks(text, os.sched_getaffinity(0))
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return Sample(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), own) if ticks else None


def busy_ticks(stat: str, processors: set[int]) -> int:
    """Clock ticks that some processors were not idle, of the text of ``/proc/stat``.

    Its fields are user, nice, system, idle, iowait, irq, softirq, steal.
    """
    busy = 0
    for line in stat.splitlines():
        name, *fields = line.split()
        number = name.removeprefix("cpu")
        if number.isdecimal() and name.startswith("cpu") and int(number) in processors:
            user, nice, system, _idle, _waiting, *rest = map(int, fields[:8])
            busy += user + nice + system + sum(rest)
    return busy


def used_by_others(before: Sample | None) -> float:
    """Processors that other processes kept busy since a sample, on average; 0 where unknown."""
    after = sample()
    if before is None or after is None or after.at <= before.at:
        return 0.0
    others = after.busy - before.busy - (after.own - before.own)
    return max(0.0, others / (after.at - before.at))


def busy_text(others: float) -> str | None:
    """The sentence about a machine whose processors others use; None where it is quiet."""
    if others < BUSY:
        return None
    count = len(os.sched_getaffinity(0))
    return f"other processes use {min(others, count):.1f} of {count} processors"


def free_threads(others: float, processors: int) -> int:
    """Threads that find a processor: as many as others leave free, at least one."""
    return max(1, min(processors, int(processors - others + 0.5)))


def set_threads(requested: int | None, root: Path | None = None) -> str | None:
    """Set how many threads compute, in this process and its children; before torch is imported.

    The number is ``requested``, else that of ``OMP_NUM_THREADS``, else that of an interrupted run
    in ``root``, else that of free processors.

    :return: a line that reports a busy machine or a number taken over; else None.
    :raises UserError: if ``requested`` exceeds the number of processors.
    """
    allowed = allowed_processors()
    if requested is not None:
        if requested > allowed:
            raise UserError(f"--threads: found {requested}; allowed are 1 to {allowed} here")
        _set(requested)
        return None
    if os.environ.get(OPENMP_THREADS):
        return None
    before = sample()
    if before is None:
        return None
    time.sleep(SAMPLE_SECONDS)
    others = used_by_others(before)
    interrupted = _threads_of_interrupted(root)
    count = interrupted or free_threads(others, len(os.sched_getaffinity(0)))
    _set(min(allowed, count))
    found = busy_text(others)
    if found is None and interrupted in (None, allowed):
        return None
    reason = "as in the run that was interrupted here; " if interrupted else ""
    said = f"{found}; " if found else ""
    return (
        f"machine: {said}{os.environ[THREADS]} of {allowed} threads compute; {reason}"
        "--threads sets the number, which can change how products are rounded"
    )


def _set(count: int) -> None:
    os.environ[THREADS] = os.environ[OPENMP_THREADS] = str(count)


def _threads_of_interrupted(root: Path | None) -> int | None:
    """How many threads computed in a run that was interrupted: its bytes may depend on them."""
    if root is None or not any(root.glob("*.partial")):
        return None
    try:
        return max(1, int((root / THREADS_FILE).read_text()))
    except (OSError, ValueError):
        return None


def wait_briefly() -> None:
    """Let OpenMP's threads spin for microseconds before they sleep; before torch is imported.

    A choice that the environment makes already stands.
    """
    if not any(os.environ.get(name) for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
        _set_here.add("GOMP_SPINCOUNT")


def deployed_environment() -> dict[str, str]:
    """The environment without :func:`wait_briefly`: runtimes are measured as users have them."""
    return {name: value for name, value in os.environ.items() if name not in _set_here}
