"""How near a model's next-token distributions are to another one's; needs no torch."""

from pathlib import Path
from typing import Any

import numpy as np

from sqft_export.data.items import Item
from sqft_export.measure.likelihood import PART
from sqft_export.measure.statistics import wilson

COMPARED = 512  # a distribution over 128k tokens is half a megabyte


def sequences_of(items: list[Item]) -> list[list[int]]:
    """Items from all parts of what is asked, as sequences of tokens; cut where there are enough."""
    sequences, left = [], COMPARED
    every = max(1, sum(len(item.ids) for item in items) // COMPARED)
    for item in items[::every]:
        sequence = item.ids[:left]
        left -= len(sequence)
        if sequence:
            sequences.append(sequence)
    return sequences


def agreement(first: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    """Next-token distributions (logarithms, ``[tokens, vocab]``) beside those of another model.

    Two vocabularies may differ in what fills them up; the tokens of both are compared.

    :return: ``agreement``, the share of tokens after which both have the same most likely next one,
        with its interval; ``kl_nats``, the mean Kullback-Leibler divergence from ``first``.
    """
    common, tokens, same, away = min(first.shape[1], found.shape[1]), len(first), 0, 0.0
    for start in range(0, tokens, PART):
        one, other = (x[start : start + PART, :common].astype(np.float64) for x in (first, found))
        same += int((one.argmax(axis=1) == other.argmax(axis=1)).sum())
        away += float((np.exp(one) * (one - other)).sum())
    low, high = wilson(same, tokens)
    return {
        "tokens": tokens,
        "agreement": same / tokens,
        "low": low,
        "high": high,
        "kl_nats": away / tokens,
    }


class Beside:
    """Asks models in turn for their distributions, and holds each to those of some before it.

    :param scratch: folder for the file that a worker writes.
    """

    def __init__(self, scratch: Path, items: list[Item]):
        self.file, self.ids = scratch / "distributions.npy", sequences_of(items)
        self.known: dict[str, np.ndarray] = {}

    def asked(self) -> dict[str, Any]:
        """Of a worker, see ``measure/worker.py``."""
        return {"distributions": {"file": str(self.file), "ids": self.ids}}

    def found(self, name: str | None = None) -> dict[str, dict[str, Any]]:
        """:func:`agreement` of the model that was asked last with every one that has a name.

        :param name: of this one, unless there is one of that name: itself and the next are held
            to it.
        """
        distributions = np.load(self.file, mmap_mode="r")
        self.file.unlink()  # it stays mapped
        if name:
            self.known.setdefault(name, distributions)
        return {known: agreement(first, distributions) for known, first in self.known.items()}
