"""Predict how long passes take on several machines, from the seconds of each pass."""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TimedPass:
    """A pass with its seconds, and the keys of the passes that it reads."""

    seconds: float
    parents: tuple[str, ...]


def predict_makespan(passes: Mapping[str, TimedPass], machines: int) -> float:
    """Return the seconds until all passes are finished, one pass per machine at a time.

    A free machine takes the ready pass with the longest path behind it (list scheduling).

    :param passes: key -> pass; parents come first.
    """
    behind = _longest_paths(passes)
    missing = {key: len(one.parents) for key, one in passes.items()}
    readers: dict[str, list[str]] = {key: [] for key in passes}
    for key, one in passes.items():
        for parent in one.parents:
            readers[parent].append(key)
    ready = [(-behind[key], key) for key, count in missing.items() if not count]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < machines:
            _, key = heapq.heappop(ready)
            heapq.heappush(running, (now + passes[key].seconds, key))
        now, done = heapq.heappop(running)
        for key in readers[done]:
            missing[key] -= 1
            if not missing[key]:
                heapq.heappush(ready, (-behind[key], key))
    return now


def ideal_seconds(passes: Mapping[str, TimedPass], machines: int) -> float:
    """Return a lower bound: the work divided by the machines, or the longest path."""
    total = sum(one.seconds for one in passes.values())
    return max(total / machines, max(_longest_paths(passes).values(), default=0.0))


def _longest_paths(passes: Mapping[str, TimedPass]) -> dict[str, float]:
    """Return the seconds of each pass and of the longest chain of passes that read it."""
    behind = {key: one.seconds for key, one in passes.items()}
    for key in reversed(list(passes)):
        for parent in passes[key].parents:
            behind[parent] = max(behind[parent], passes[parent].seconds + behind[key])
    return behind
