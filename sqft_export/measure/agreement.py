"""Compare next-token distributions of two models: top-1 agreement and KL divergence. No torch."""

from pathlib import Path

import numpy as np

from sqft_export.data.items import Item
from sqft_export.measure.jobs import DistributionsRequest
from sqft_export.measure.likelihood import FLOAT64_CHUNK_TOKENS
from sqft_export.measure.results import Agreement
from sqft_export.measure.statistics import wilson

COMPARED_TOKENS = 512  # a float32 distribution over a vocabulary of 128k takes half a megabyte


def sequences_of(items: list[Item]) -> list[list[int]]:
    """Return token sequences of evenly spread items, at most ``COMPARED_TOKENS`` in total."""
    sequences, left = [], COMPARED_TOKENS
    every = max(1, sum(len(item.ids) for item in items) // COMPARED_TOKENS)
    for item in items[::every]:
        sequence = item.ids[:left]
        left -= len(sequence)
        if sequence:
            sequences.append(sequence)
    return sequences


def agreement(first: np.ndarray, other: np.ndarray) -> Agreement:
    """Compare the log-probabilities ``[tokens, vocab]`` of two models.

    Padded vocabularies may differ in size; the tokens that both models have are compared.
    The KL divergence is that from ``first``.
    """
    common, tokens, same, divergence = min(first.shape[1], other.shape[1]), len(first), 0, 0.0
    for start in range(0, tokens, FLOAT64_CHUNK_TOKENS):
        chunk = slice(start, start + FLOAT64_CHUNK_TOKENS)
        p, q = (x[chunk, :common].astype(np.float64) for x in (first, other))
        same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        divergence += float((np.exp(p) * (p - q)).sum())
    low, high = wilson(same, tokens)
    return Agreement(
        tokens=tokens,
        agreement=same / tokens,
        low=low,
        high=high,
        kl_nats=divergence / tokens,
    )


class ReferenceModels:
    """Named reference models, whose distributions are compared with those of later models.

    :param scratch: folder for the file that a worker writes.
    :param items: items whose tokens are compared.
    """

    def __init__(self, scratch: Path, items: list[Item]):
        self.file, self.ids = scratch / "distributions.npy", sequences_of(items)
        self.references: dict[str, np.ndarray] = {}

    def request(self) -> DistributionsRequest:
        """Return the request to a worker for its model's distributions."""
        return DistributionsRequest(file=self.file, ids=self.ids)

    def compare(self, name: str | None = None) -> dict[str, Agreement]:
        """Return :func:`agreement` of the last model with every named reference model.

        :param name: store this model's distributions as a reference under that name, unless the
            name is taken.
        """
        distributions = np.load(self.file, mmap_mode="r")
        self.file.unlink()  # the array stays mapped
        if name:
            self.references.setdefault(name, distributions)
        return {
            reference: agreement(first, distributions)
            for reference, first in self.references.items()
        }
