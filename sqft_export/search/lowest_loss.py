"""The best of the median, the most frequent and the five drawn at the lowest training losses.

NNCF's choice for its downstream NLS example; there on the test task, here on the validation split.
"""

from sqft_export.search import Ranks, Space, frequent, median

DRAWN = 5


def search(space: Space) -> Ranks:
    lowest = sorted(space.log, key=lambda step: step["loss"])[:DRAWN]
    for ranks in (median.search(space), frequent.search(space), *(s["ranks"] for s in lowest)):
        space.evaluate(ranks)
    return space.best()
