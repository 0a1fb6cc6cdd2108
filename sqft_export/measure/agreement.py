"""Compare next-token distributions of two models: top-1 agreement and KL divergence. No torch."""

from pathlib import Path
from typing import Any

import numpy as np

from sqft_export.data.items import Item
from sqft_export.measure.likelihood import PART
from sqft_export.measure.statistics import wilson

COMPARED = 512  # tokens; a distribution over 128k tokens takes half a megabyte


def sequences_of(items: list[Item]) -> list[list[int]]:
    """Return token sequences of evenly spread items, together at most ``COMPARED`` tokens."""
    sequences, left = [], COMPARED
    every = max(1, sum(len(item.ids) for item in items) // COMPARED)
    for item in items[::every]:
        sequence = item.ids[:left]
        left -= len(sequence)
        if sequence:
            sequences.append(sequence)
    return sequences


def agreement(first: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    """Compare the log-probabilities ``[tokens, vocab]`` of two models.

    Padded vocabularies may differ in size; the tokens that both have are compared.

    :return: ``agreement``, the share of positions with the same argmax, and its interval ``low`` to
        ``high``; ``kl_nats``, the mean KL divergence from ``first`` in nats per token.
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
    """Compares the distributions of each model with those of named reference models before it.

    :param scratch: folder for the file that a worker writes.
    :param items: items whose tokens are compared.
    """

    def __init__(self, scratch: Path, items: list[Item]):
        self.file, self.ids = scratch / "distributions.npy", sequences_of(items)
        self.known: dict[str, np.ndarray] = {}

    def asked(self) -> dict[str, Any]:
        """Return the part of a worker's job that requests distributions (``measure/worker.py``)."""
        return {"distributions": {"file": str(self.file), "ids": self.ids}}

    def found(self, name: str | None = None) -> dict[str, dict[str, Any]]:
        """Return :func:`agreement` of the last model with every reference model.

        :param name: store this model's distributions as a reference under that name, unless the
            name is taken.
        """
        distributions = np.load(self.file, mmap_mode="r")
        self.file.unlink()  # the array stays mapped
        if name:
            self.known.setdefault(name, distributions)
        return {known: agreement(first, distributions) for known, first in self.known.items()}
