"""Hill climbing from the median: move to the best neighbour while it improves the score."""

from collections.abc import Iterator

from sqft_export.search.rules import pick_median
from sqft_export.search.space import Ranks, Space


def neighbours(space: Space, ranks: Ranks) -> Iterator[Ranks]:
    """Yield the configurations that differ by one rank step in one group."""
    for group, rank in ranks.items():
        index = space.ranks.index(rank)
        for other in (index - 1, index + 1):
            if 0 <= other < len(space.ranks):
                yield ranks | {group: space.ranks[other]}


def search(space: Space) -> Ranks:
    """Return the best configuration on the path to a local maximum."""
    current = pick_median(space)
    score = space.evaluate(current)
    while score is not None and not space.spent:
        around = [(space.evaluate(ranks), ranks) for ranks in neighbours(space, current)]
        known = [(found, ranks) for found, ranks in around if found is not None]
        best, ranks = max(known, key=lambda pair: pair[0], default=(score, current))
        if best <= score:
            break
        score, current = best, ranks
    return space.best()
