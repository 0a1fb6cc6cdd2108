"""Prompts of unequal lengths as one batch, filled up as a runtime wants it; needs no torch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sqft_export.targets import Session

ROWS = 64  # of a batch
CACHED = 2**14  # tokens whose cache a batch may take
SCORED = 2**9  # tokens of a pass: enough to be fast, few enough to be of like lengths
PASS_BYTES = 2**28  # of one pass


def batches(
    session: Session,
    lengths: list[int],
    order: list[int],
    tokens: int,
    growth: int = 0,
    wanted: int | None = None,
) -> Iterator[list[int]]:
    """Indices of every sequence once, in a given order, in batches that fit.

    :param order: indices; sequences of like lengths should be neighbours.
    :param tokens: of a batch filled up, growth included.
    :param growth: tokens that will follow each.
    :param wanted: tokens of each whose logits are asked for in one pass; None: all.
    """
    batch: list[int] = []
    longest = 0
    for index in order:
        rows, longest = len(batch) + 1, max(longest, lengths[index])
        scored = max(longest if session.all_logits or wanted is None else 0, wanted or 0)
        logit_bytes = rows * scored * session.vocabulary * 4
        fits = rows * (longest + growth) <= tokens and logit_bytes <= PASS_BYTES
        if batch and (rows > ROWS or not fits):
            yield batch
            batch, longest = [], lengths[index]
        batch.append(index)
    if batch:
        yield batch


def by_length(lengths: list[int]) -> list[int]:
    """Indices, the shortest first."""
    return sorted(range(len(lengths)), key=lengths.__getitem__)


@dataclass
class Batch:
    """Sequences side by side.

    ids: int64 ``[batch, length]``. mask: int64 of that shape, 0 where filled up.
    """

    ids: np.ndarray
    mask: np.ndarray


def padded(sequences: list[list[int]], side: str) -> Batch:
    """:param side: left or right, where shorter ones are filled up."""
    longest = max(map(len, sequences))
    ids = np.zeros((len(sequences), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        count = len(sequence)
        place = slice(longest - count, None) if side == "left" else slice(count)
        ids[row, place], mask[row, place] = sequence, 1
    return Batch(ids, mask)


def last_logits(session: Session, batch: Batch) -> np.ndarray:
    """Logits ``[batch, vocabulary]`` after the last token of every sequence, on an empty cache.

    Where shorter ones are filled up on the left, they join when they begin: what is cached before
    that is another one's, and their mask hides it.
    """
    session.reset()
    length, firsts = batch.ids.shape[1], batch.mask.argmax(axis=1)
    start, before = 0, np.empty(0, np.int64)
    joining = session.padding == "left"
    for stop in _stops(firsts, length, session.pass_tokens) if joining else [length]:
        rows = np.flatnonzero(firsts < stop)
        if start:
            session.select(np.searchsorted(before, rows).clip(max=len(before) - 1))
        logits = session.forward(batch.ids[rows, start:stop], batch.mask[rows, :stop], 1)
        start, before = stop, rows
    return logits[:, -1]


def _stops(firsts: np.ndarray, length: int, pass_tokens: int) -> list[int]:
    """Where the passes over a batch end, each over those rows that have begun before its end, for
    the least tokens in all.

    :param firsts: int64 ``[batch]``, where each row begins; one begins at 0.
    :param pass_tokens: that a pass counts as, beside its own.
    """
    columns = [*np.unique(firsts).tolist(), length]
    cost, way = [0] * len(columns), [list[int]()] * len(columns)
    for end, stop in enumerate(columns[1:], 1):
        rows = int((firsts < stop).sum())
        costs = [cost[begin] + pass_tokens + rows * (stop - columns[begin]) for begin in range(end)]
        best = int(np.argmin(costs))
        cost[end], way[end] = costs[best], [*way[best], stop]
    return way[-1]
