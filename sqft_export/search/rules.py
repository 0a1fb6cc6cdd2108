"""Search strategies that evaluate nothing: each picks the ranks by a fixed rule."""

from collections import Counter

from sqft_export.search.space import Ranks, Space


def pick_median(space: Space) -> Ranks:
    """Give every group the middle rank, the heuristic of the SQFT authors."""
    return dict.fromkeys(space.groups, space.ranks[(len(space.ranks) - 1) // 2])


def pick_maximal(space: Space) -> Ranks:
    """Give every group the highest rank."""
    return dict.fromkeys(space.groups, max(space.ranks))


def pick_minimal(space: Space) -> Ranks:
    """Give every group the lowest rank."""
    return dict.fromkeys(space.groups, min(space.ranks))


def pick_most_frequent(space: Space) -> Ranks:
    """Give every group the rank drawn most often in training; ties go to the higher rank."""
    counts = {group: Counter(step["ranks"][group] for step in space.log) for group in space.groups}
    return {
        group: max(space.ranks, key=lambda rank: (found[rank], rank))
        for group, found in counts.items()
    }


def pick_configured(space: Space) -> Ranks:
    """Return the configuration that the recipe gives, such as an earlier ``configuration.json``."""
    return space.configured
