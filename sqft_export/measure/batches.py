"""Prompts of unequal lengths as one batch, filled up as a runtime wants it; needs no torch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sqft_export.targets import Session

ROWS = 64  # of a batch
TOKENS = 2**13  # of a batch, those it will grow by included: what its cache may take
LOGIT_BYTES = 2**28  # of one pass


def of_like_lengths(
    session: Session, lengths: list[int], growth: int = 0, wanted: int | None = None
) -> Iterator[list[int]]:
    """Indices of every sequence once, the shortest first, in batches that fit.

    :param growth: tokens that will follow each.
    :param wanted: tokens of each whose logits are asked for in one pass; None: all.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        rows, longest = len(batch) + 1, lengths[index]
        scored = max(longest if session.all_logits or wanted is None else 0, wanted or 0)
        logit_bytes = rows * scored * session.vocabulary * 4
        fits = rows * (longest + growth) <= TOKENS and logit_bytes <= LOGIT_BYTES
        if batch and (rows > ROWS or not fits):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@dataclass
class Batch:
    """Sequences side by side.

    ids: int64 ``[batch, length]``. mask: int64 of that shape, 0 where filled up.
    ends: int64 ``[batch]``, where each one's last token is.
    """

    ids: np.ndarray
    mask: np.ndarray
    ends: np.ndarray


def padded(sequences: list[list[int]], side: str) -> Batch:
    """:param side: left or right, where shorter ones are filled up."""
    longest = max(map(len, sequences))
    ids = np.zeros((len(sequences), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        count = len(sequence)
        place = slice(longest - count, None) if side == "left" else slice(count)
        ids[row, place], mask[row, place] = sequence, 1
    ends = np.array([longest - 1 if side == "left" else len(s) - 1 for s in sequences])
    return Batch(ids, mask, ends)


def last_logits(session: Session, batch: Batch) -> np.ndarray:
    """Logits ``[batch, vocabulary]`` after the last token of every sequence, on an empty cache."""
    session.reset()
    length = batch.ids.shape[1]
    last = int(length - batch.ends.min())
    logits = session.forward(batch.ids, batch.mask, last)
    return logits[np.arange(len(logits)), batch.ends - (length - last)]
