"""Pruning masks: bool ``[out, in]``, True where the weight is kept.

A mask is made once, by ``sparsify``, stored one bit per weight and carried through every later
artifact. It is never derived again from ``weight != 0``: rounding to INT4 makes further zeros.
"""

import functools
import math

import torch
from torch import Tensor

_SELECTED_ROWS = 1024  # rows per selection, which bounds its scratch memory


def drop_lowest(scores: Tensor, count: int) -> Tensor:
    """Return a mask without the ``count`` lowest scores per row; ties drop the lower column.

    :param scores: ``[rows, columns]``, any float dtype.
    :return: bool ``[rows, columns]``, True = kept.
    """
    mask = torch.ones_like(scores, dtype=torch.bool)
    for start in range(0, len(scores) if count else 0, _SELECTED_ROWS):
        rows = scores[start : start + _SELECTED_ROWS]
        # Selecting the count-th score takes time linear in the columns; sorting does not.
        threshold = rows.kthvalue(count, dim=1, keepdim=True).values
        below, tied = rows < threshold, rows == threshold
        remaining = count - below.sum(dim=1, keepdim=True)
        mask[start : start + _SELECTED_ROWS] = ~(below | (tied & (tied.cumsum(dim=1) <= remaining)))
    return mask


def drop_share(scores: Tensor, sparsity: float) -> Tensor:
    """Drop the ``floor(in * sparsity)`` lowest scores of every output row.

    The comparison group is one output row, as in Wanda (arXiv 2306.11695).
    """
    # The epsilon keeps 0.29 * 100 from being 28.
    return drop_lowest(scores, math.floor(scores.shape[1] * sparsity + 1e-6))


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Return an N:M mask: the ``n`` highest scores of every ``m`` consecutive columns are kept.

    :raises ValueError: if ``m`` does not divide the number of columns.
    """
    if scores.shape[1] % m:
        raise ValueError(f"{n} of {m} needs inputs divisible by {m}, found {scores.shape[1]}")
    return drop_lowest(scores.reshape(-1, m), m - n).reshape(scores.shape)


def keep_at_most(scores: Tensor, n: int, m: int) -> Tensor:
    """Lower all scores but the ``n`` highest of every ``m`` consecutive columns to -inf.

    A mask made from these scores drops the lowered ones first, so that no ``m`` columns keep more.

    :raises ValueError: if ``m`` does not divide the number of columns.
    """
    return scores.masked_fill(~keep_n_of_m(scores, n, m), -math.inf)


def mask_to_bits(mask: Tensor) -> Tensor:
    """Pack a mask, lowest column in the lowest bit: uint8 ``[out, ceil(in / 8)]``."""
    out_features, in_features = mask.shape
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -in_features % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = padded.reshape(out_features, -1, 8) << shifts
    return bits.sum(dim=2, dtype=torch.uint8)


def bits_to_mask(packed: Tensor, in_features: int) -> Tensor:
    """Invert :func:`mask_to_bits`; return bool ``[out, in_features]``."""
    # Eight bools are one 64-bit word of a table: a training step unpacks every mask twice.
    words = _words(packed.device)[packed.int()]
    return words.view(torch.bool)[:, :in_features]


@functools.cache
def _words(device: torch.device) -> Tensor:
    """int64 ``[256]``: the eight bools of every byte, in memory order."""
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = (torch.arange(256, dtype=torch.uint8).unsqueeze(1) >> shifts) & 1
    return bits.bool().view(torch.int64).squeeze(1).to(device)
