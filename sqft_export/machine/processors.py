"""Measure which processors are free, and set the number of OpenMP threads.

OpenMP's threads wait for each other after every operation. If one of them shares its processor
with another program, all others wait for it. By default they spin, which slows it down further.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from sqft_export.errors import UserError
from sqft_export.machine.host import THREADS_VARIABLE, allowed_processors

STAT = Path("/proc/stat")
SAMPLE_SECONDS = 0.25
MIN_BUSY_PROCESSORS = 0.25  # used by other programs; below it the machine counts as quiet
OPENMP_THREADS = "OMP_NUM_THREADS"
SPIN_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # they set how OpenMP's threads wait
SPIN_COUNT = "1000"  # iterations, some microseconds; libgomp spins for milliseconds by default
THREADS_FILE = ".threads"  # in a run's folder: the run's number of threads
_variables_set: set[str] = set()


@dataclass(frozen=True)
class Sample:
    """Clock and processor time at one moment, in seconds.

    at: monotonic clock.
    busy: busy time of all processors that this process may run on.
    own: processor time of this process and its ended children.
    """

    at: float
    busy: float
    own: float


def sample() -> Sample | None:
    """Take a sample; None if the system does not report processor times."""
    try:
        text = STAT.read_text()
    except OSError:
        return None
    ticks = busy_ticks(text, os.sched_getaffinity(0))
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return Sample(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), own) if ticks else None


def busy_ticks(stat: str, processors: set[int]) -> int:
    """Return the clock ticks for which some processors were busy.

    :param stat: text of ``/proc/stat``. The fields of a processor are user, nice, system, idle,
        iowait, irq, softirq, steal.
    :param processors: numbers of the processors to add up.
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
    """Return how many processors other processes used on average since a sample; 0 if unknown."""
    return used_between(before, sample())


def used_between(before: Sample | None, after: Sample | None) -> float:
    """Return how many processors other processes used on average between two samples."""
    if before is None or after is None or after.at <= before.at:
        return 0.0
    others = after.busy - before.busy - (after.own - before.own)
    return max(0.0, others / (after.at - before.at))


def busy_text(others: float) -> str | None:
    """Return a sentence about a busy machine; None if the machine is quiet.

    :param others: processors that other processes use.
    """
    if others < MIN_BUSY_PROCESSORS:
        return None
    count = len(os.sched_getaffinity(0))
    return f"other processes use {min(others, count):.1f} of {count} processors"


def free_threads(others: float, processors: int) -> int:
    """Return the number of threads with a free processor each, at least one.

    :param others: processors that other processes use.
    :param processors: processors that this process may use.
    """
    return max(1, min(processors, int(processors - others + 0.5)))


def set_threads(requested: int | None, root: Path | None = None) -> str | None:
    """Set the number of threads of this process and its children; call it before importing torch.

    The first of these that is known counts: ``requested``, ``OMP_NUM_THREADS``, the number of an
    interrupted run in ``root``, the number of free processors.

    :return: a line that reports a busy machine or an interrupted run's number; else None.
    :raises UserError: if ``requested`` exceeds the number of processors.
    """
    allowed = allowed_processors()
    if requested is not None:
        if requested > allowed:
            raise UserError(f"--threads: found {requested}; allowed are 1 to {allowed} here")
        _set_thread_variables(requested)
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
    _set_thread_variables(min(allowed, count))
    found = busy_text(others)
    if found is None and interrupted in (None, allowed):
        return None
    reason = "as in the interrupted run; " if interrupted else ""
    load = f"{found}; " if found else ""
    return (
        f"machine: {load}{os.environ[THREADS_VARIABLE]} of {allowed} threads are used; {reason}"
        "--threads sets the number, which can change how products are rounded"
    )


def _set_thread_variables(count: int) -> None:
    os.environ[THREADS_VARIABLE] = os.environ[OPENMP_THREADS] = str(count)


def _threads_of_interrupted(root: Path | None) -> int | None:
    """Return the number of threads of an interrupted run, since its bytes may depend on it."""
    if root is None or not any(root.glob("*.partial")):
        return None
    try:
        return max(1, int((root / THREADS_FILE).read_text()))
    except (OSError, ValueError):
        return None


def limit_openmp_spinning() -> None:
    """Let OpenMP's threads spin only for microseconds; call it before importing torch.

    Variables that the environment already sets stay unchanged.
    """
    if not any(os.environ.get(name) for name in SPIN_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
        _variables_set.add("GOMP_SPINCOUNT")


def deployed_environment() -> dict[str, str]:
    """Return the environment without the variables that :func:`limit_openmp_spinning` set.

    Runtimes are measured in it, with the settings that users have.
    """
    return {name: value for name, value in os.environ.items() if name not in _variables_set}
