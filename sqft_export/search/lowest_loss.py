"""Evaluate the median, the most frequent and the five draws with the lowest training losses.

NNCF's downstream NLS example selects from the same candidates, on the test task. Here the
validation split decides.
"""

from sqft_export.search.rules import pick_median, pick_most_frequent
from sqft_export.search.space import Ranks, Space

LOWEST_LOSS_DRAWS = 5


def search(space: Space) -> Ranks:
    """Return the candidate with the highest score."""
    lowest = sorted(space.log, key=lambda step: step["loss"])[:LOWEST_LOSS_DRAWS]
    for ranks in (pick_median(space), pick_most_frequent(space), *(s["ranks"] for s in lowest)):
        space.evaluate(ranks)
    return space.best()
