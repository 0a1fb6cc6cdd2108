"""The search space: configurations of ranks, a budget, and the scores measured so far."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqft_export.adapters.files import RankedStepLog

Ranks = dict[str, int]


@dataclass(frozen=True, order=True)
class Score:
    """Score of a configuration on the validation split; higher is better.

    accuracy: share of validation items answered right, or of tokens predicted right.
    likelihood: mean log-likelihood of the expected tokens; decides between equal accuracies.
    size: number of adapter parameters, negated.
    """

    accuracy: float
    likelihood: float
    size: int


@dataclass
class Space:
    """All configurations of ranks, and the scores of those evaluated so far.

    groups: names of the elastic groups.
    ranks: allowed ranks, in descending order.
    log: the training log, one entry per step with ``loss`` and ``ranks``.
    budget: largest number of evaluations.
    configured: the configuration that the recipe gives, for the strategy ``configured``.
    score: evaluates one configuration.
    seen: score of every configuration evaluated so far.
    """

    groups: list[str]
    ranks: tuple[int, ...]
    log: list["RankedStepLog"]
    budget: int
    seed: int
    configured: Ranks
    score: Callable[[Ranks], Score]
    seen: dict[tuple[int, ...], Score] = field(default_factory=dict)

    @property
    def spent(self) -> bool:
        """True when the budget allows no further evaluation."""
        return len(self.seen) >= self.budget

    def key(self, ranks: Ranks) -> tuple[int, ...]:
        """Return the ranks in the order of ``groups``."""
        return tuple(ranks[group] for group in self.groups)

    def evaluate(self, ranks: Ranks) -> Score | None:
        """Return a configuration's score, evaluated once; None when the budget is spent."""
        key = self.key(ranks)
        if key not in self.seen:
            if self.spent:
                return None
            self.seen[key] = self.score(ranks)
        return self.seen[key]

    def best(self) -> Ranks:
        """Return the configuration with the highest score so far."""
        best = max(self.seen, key=lambda key: self.seen[key])
        return dict(zip(self.groups, best, strict=True))
