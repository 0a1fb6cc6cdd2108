"""Search strategies by their name in a recipe.

Strategies that evaluate configurations do so through the space, which remembers every score. They
return the best configuration that they have seen.
"""

from collections.abc import Callable

from sqft_export.search import evolutionary, hill_climb, lowest_loss, rules
from sqft_export.search.space import Ranks, Space

STRATEGIES: dict[str, Callable[[Space], Ranks]] = {
    "median": rules.pick_median,
    "maximal": rules.pick_maximal,
    "minimal": rules.pick_minimal,
    "frequent": rules.pick_most_frequent,
    "configured": rules.pick_configured,
    "lowest-loss": lowest_loss.search,
    "hill-climb": hill_climb.search,
    "evolutionary": evolutionary.search,
}
