"""Search strategies, one file each; the file name is the word in the recipe.

Those that evaluate do so through the space, which remembers every result, and return the best
configuration ever seen.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

Ranks = dict[str, int]


@dataclass(frozen=True, order=True)
class Score:
    """What a configuration is worth on the validation split; a higher one is better.

    accuracy: share of validation items answered right, or tokens predicted right.
    likelihood: mean log likelihood of the expected tokens; decides between equal accuracies.
    size: adapter parameters, negative.
    """

    accuracy: float
    likelihood: float
    size: int


@dataclass
class Space:
    """The configurations there are, and what is known of them.

    ranks: descending.
    log: the training log, one entry a step with ``loss`` and ``ranks``.
    budget: evaluations allowed.
    configured: the recipe's own configuration, for the strategy of that name.
    score: evaluates one configuration.
    """

    groups: list[str]
    ranks: tuple[int, ...]
    log: list[dict[str, Any]]
    budget: int
    seed: int
    configured: Ranks
    score: Callable[[Ranks], Score]
    seen: dict[tuple[int, ...], Score] = field(default_factory=dict)

    @property
    def spent(self) -> bool:
        return len(self.seen) >= self.budget

    def key(self, ranks: Ranks) -> tuple[int, ...]:
        return tuple(ranks[group] for group in self.groups)

    def evaluate(self, ranks: Ranks) -> Score | None:
        """Score of a configuration, from memory if it is known; None if the budget is spent."""
        key = self.key(ranks)
        if key not in self.seen:
            if self.spent:
                return None
            self.seen[key] = self.score(ranks)
        return self.seen[key]

    def best(self) -> Ranks:
        """The best configuration ever seen."""
        best = max(self.seen, key=lambda key: self.seen[key])
        return dict(zip(self.groups, best, strict=True))


class Strategy(Protocol):
    def search(self, space: Space, /) -> Ranks:
        """The rank of every group."""


def strategy(name: str) -> Strategy:
    return cast(Strategy, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))


if TYPE_CHECKING:  # mypy holds every module to the protocol
    from sqft_export.search import (
        evolutionary,
        frequent,
        given,
        hill_climb,
        lowest_loss,
        maximal,
        median,
        minimal,
    )

    _STRATEGIES: tuple[Strategy, ...] = (
        evolutionary,
        frequent,
        given,
        hill_climb,
        lowest_loss,
        maximal,
        median,
        minimal,
    )
