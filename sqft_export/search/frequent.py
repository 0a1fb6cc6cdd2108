"""The rank that each group had most often in training; the highest of equals."""

from collections import Counter

from sqft_export.search import Ranks, Space


def search(space: Space) -> Ranks:
    counts = {group: Counter(step["ranks"][group] for step in space.log) for group in space.groups}
    return {
        group: max(space.ranks, key=lambda rank: (found[rank], rank))
        for group, found in counts.items()
    }
