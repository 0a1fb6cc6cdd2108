"""Tests whether a model's accuracy on a task is above that of guessing."""

from typing import Any

from sqft_export.data.items import Item

GUESSING_PERPLEXITY = 1000  # of held-out text; a model that guesses is above


def chance_accuracy(items: list[Item]) -> float | None:
    """Accuracy of a model that guesses: 1 over the number of choices, 0 where answers are
    generated, the mean over sets; None for plain text, which has no answers."""
    by_set: dict[str, list[float]] = {}
    for item in items:
        if item.text is not None:
            guessed = 1 / len(item.choices) if item.scoring == "choice" else 0.0
            by_set.setdefault(item.source, []).append(guessed)
    if not by_set:
        return None
    means = [sum(guesses) / len(guesses) for guesses in by_set.values()]
    return sum(means) / len(means)


def is_at_chance(row: dict[str, Any]) -> bool:
    """Whether the accuracy of a row is not significantly above ``chance`` (95 %); for plain text,
    whether its perplexity is that of a model that guesses."""
    if row["interval"] is None or row["chance"] is None:
        return not row["perplexity"] <= GUESSING_PERPLEXITY
    return row["interval"][0] <= row["chance"]
