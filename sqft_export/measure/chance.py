"""Test whether a model's accuracy on a task is above that of guessing."""

from sqft_export.data.items import Item
from sqft_export.measure.results import BenchmarkRow

GUESSING_PERPLEXITY = 1000  # a model whose perplexity on held-out text is higher guesses


def chance_accuracy(items: list[Item]) -> float | None:
    """Return the accuracy of guessing, as the mean over sets.

    An item with choices counts as 1 over the number of choices, an item with a generated answer as
    0. Returns None for plain text, which has no answers.
    """
    by_set: dict[str, list[float]] = {}
    for item in items:
        if item.text is not None:
            guessed = 1 / len(item.choices) if item.scoring == "choice" else 0.0
            by_set.setdefault(item.source, []).append(guessed)
    if not by_set:
        return None
    means = [sum(guesses) / len(guesses) for guesses in by_set.values()]
    return sum(means) / len(means)


def is_at_chance(row: BenchmarkRow) -> bool:
    """Return whether the accuracy of a row is not significantly above ``chance`` (95 %).

    Plain text has no chance accuracy. For it, return whether the perplexity is above
    ``GUESSING_PERPLEXITY`` or NaN.
    """
    if row.interval is None or row.chance is None:
        return not row.perplexity <= GUESSING_PERPLEXITY
    return row.interval[0] <= row.chance
