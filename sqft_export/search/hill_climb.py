"""From the median on to the best neighbour, one rank up or down in a group, while it is better."""

from collections.abc import Iterator

from sqft_export.search import Ranks, Space, median


def neighbours(space: Space, ranks: Ranks) -> Iterator[Ranks]:
    """All configurations one step away in one group."""
    for group, rank in ranks.items():
        place = space.ranks.index(rank)
        for other in (place - 1, place + 1):
            if 0 <= other < len(space.ranks):
                yield ranks | {group: space.ranks[other]}


def search(space: Space) -> Ranks:
    current = median.search(space)
    score = space.evaluate(current)
    while score is not None and not space.spent:
        around = [(space.evaluate(ranks), ranks) for ranks in neighbours(space, current)]
        known = [(found, ranks) for found, ranks in around if found is not None]
        best, ranks = max(known, key=lambda pair: pair[0], default=(score, current))
        if best <= score:
            break
        score, current = best, ranks
    return space.best()
