"""Group prompts of unequal lengths into padded batches. Needs no torch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sqft_export.targets import Session

MAX_BATCH_ROWS = 64
MAX_CACHE_TOKENS = 2**14  # tokens of one batch in the key-value cache, padding included
# Tokens of one pass that scores. A pass of this size is fast. Larger ones mix unequal lengths.
SCORING_PASS_TOKENS = 2**9
MAX_LOGIT_BYTES = 2**28  # float32 logits of one pass


def split_batches(
    session: Session,
    lengths: list[int],
    order: list[int],
    tokens: int,
    growth: int = 0,
    scored_tokens: int | None = None,
) -> Iterator[list[int]]:
    """Yield the indices of all sequences, in the given order, in batches that fit into memory.

    :param order: indices. Sequences of similar lengths should be neighbours.
    :param tokens: largest number of tokens of a batch, padding and growth included.
    :param growth: number of tokens that are generated after each sequence.
    :param scored_tokens: number of tokens per sequence whose logits one pass returns; None: all.
    """
    batch: list[int] = []
    longest = 0
    for index in order:
        rows, longest = len(batch) + 1, max(longest, lengths[index])
        every_token = session.all_logits or scored_tokens is None
        scored = max(longest if every_token else 0, scored_tokens or 0)
        logit_bytes = rows * scored * session.vocabulary * 4
        fits = rows * (longest + growth) <= tokens and logit_bytes <= MAX_LOGIT_BYTES
        if batch and (rows > min(MAX_BATCH_ROWS, session.max_rows) or not fits):
            yield batch
            batch, longest = [], lengths[index]
        batch.append(index)
    if batch:
        yield batch


def sort_by_length(lengths: list[int]) -> list[int]:
    """Return the indices of ``lengths``, sorted from the shortest to the longest."""
    return sorted(range(len(lengths)), key=lengths.__getitem__)


@dataclass
class Batch:
    """Padded sequences.

    ids: int64 ``[batch, length]``, 0 at padding.
    mask: int64 ``[batch, length]``, 1 at tokens and 0 at padding.
    """

    ids: np.ndarray
    mask: np.ndarray


def pad_sequences(sequences: list[list[int]], side: str) -> Batch:
    """Pad sequences to the longest one.

    :param side: ``left`` or ``right``, the side of the padding.
    """
    longest = max(map(len, sequences))
    ids = np.zeros((len(sequences), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        count = len(sequence)
        columns = slice(longest - count, None) if side == "left" else slice(count)
        ids[row, columns], mask[row, columns] = sequence, 1
    return Batch(ids, mask)


def last_logits(session: Session, batch: Batch) -> np.ndarray:
    """Return the logits ``[batch, vocabulary]`` after the last token of every sequence.

    The cache is emptied first. With padding on the left, a shorter row joins the batch at the
    column where it begins. Its padding before that column is not computed. Two rows of 6 and 2
    tokens can take two passes::

        row 0   a b c d | e f     pass 1: columns 0 to 3 of row 0
        row 1   . . . . | g h     pass 2: columns 4 and 5 of rows 0 and 1

    A row that joins gets a copy of another row's cache. Its mask hides these entries. Rows of a
    model with recurrent layers do not join, because no mask hides a state.
    """
    session.reset()
    length, begins = batch.ids.shape[1], batch.mask.argmax(axis=1)
    start, before = 0, np.empty(0, np.int64)
    joins = session.padding == "left" and session.joins
    for stop in _pass_ends(begins, length, session.pass_tokens) if joins else [length]:
        rows = np.flatnonzero(begins < stop)
        if start:
            session.select(np.searchsorted(before, rows).clip(max=len(before) - 1))
        logits = session.forward(batch.ids[rows, start:stop], batch.mask[rows, :stop], 1)
        start, before = stop, rows
    return logits[:, -1]


def _pass_ends(begins: np.ndarray, length: int, pass_tokens: int) -> list[int]:
    """Return the columns at which the passes over a left-padded batch end.

    A pass computes every row that begins before the end of the pass. The ends minimize the number
    of computed tokens, plus ``pass_tokens`` per pass (dynamic programming over the columns).

    :param begins: int64 ``[batch]``, the first column of each row. At least one is 0.
    :param pass_tokens: fixed cost of a pass, in tokens.
    """
    columns = [*np.unique(begins).tolist(), length]
    cost, ends = [0] * len(columns), [list[int]()] * len(columns)
    for end, stop in enumerate(columns[1:], 1):
        rows = int((begins < stop).sum())
        costs = [cost[begin] + pass_tokens + rows * (stop - columns[begin]) for begin in range(end)]
        best = int(np.argmin(costs))
        cost[end], ends[end] = costs[best], [*ends[best], stop]
    return ends[-1]
