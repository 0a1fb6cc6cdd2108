"""Mask-aware GPTQ.

GPTQ (arXiv 2210.17323) rounds one input column at a time. The columns that are not yet rounded
absorb the error ``e = (w - w_hat) / U_cc`` by ``w_j -= e * U_cj``. ``U`` is the upper Cholesky
factor of the inverse of the Hessian ``H = X^T X``.

In a pruned layer these updates make pruned weights nonzero. Here a pruned weight takes updates
until its column is reached. It is then set to zero, and its value is part of the error that later
columns absorb. So every zero is kept, and the kept weights of the row absorb the complete error.
This is SparseGPT's update (arXiv 2301.00774) with a fixed mask.

The result is the *compensated* weight: each column has the values that it had before rounding. Its
codes on the grid are GPTQ's codes. Training starts from these floats, without a rounding error.
"""

import torch
from torch import Tensor

from sqft_export.numerics.affine import Grid, fit_grid
from sqft_export.numerics.codes import FLOAT16_BITS

NEEDS = "factor"
_COLUMNS_AT_ONCE = 128  # later columns are updated once per this many columns


def compress(
    weight: Tensor,
    mask: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    factor: Tensor | None,
    scale_bits: int = FLOAT16_BITS,
) -> tuple[Tensor, Grid]:
    """Return the compensated weight and the grid of one Linear.

    :param weight: float32 ``[out, in]``.
    :param mask: bool ``[out, in]``, True = kept.
    :param factor: float32 ``[in, in]``, ``U`` of ``numerics.hessian.inverse_factor``.
    :return: float32 ``[out, in]`` with exact zeros at pruned positions; and its grid. A group is
        fitted to the weights that it has when its first column is reached.
    """
    assert factor is not None  # NEEDS
    # Transposed, so that an input column is contiguous: every step reads one.
    work, kept = weight.T.contiguous(), mask.T
    _zero_pruned(work, kept)
    fitted: list[Grid] = []
    in_features = weight.shape[1]
    chunk = min(group_size, _COLUMNS_AT_ONCE)  # so that every group starts at a chunk
    for start in range(0, in_features, chunk):
        stop = min(start + chunk, in_features)
        if start % group_size == 0:
            group = slice(start, start + group_size)
            weights = (work[group] * kept[group]).T
            fitted.append(fit_grid(weights, bits, group_size, symmetric, scale_bits))
        errors = _round_columns(work, kept, start, stop, fitted[-1], factor)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    scales = torch.cat([grid.scale for grid in fitted], dim=1)
    zero_points = torch.cat([grid.zero_point for grid in fitted], dim=1)
    _zero_pruned(work, kept)
    return work.T, Grid(scales, zero_points, bits, group_size)


def _round_columns(
    work: Tensor, kept: Tensor, start: int, stop: int, grid: Grid, factor: Tensor
) -> Tensor:
    """Round columns ``start`` to ``stop`` one by one and return the errors ``[stop - start, out]``.

    Columns up to ``stop`` absorb the errors; the caller updates the columns after it.

    :param work: float32 ``[in, out]``, changed in place.
    :param kept: mask, bool ``[in, out]``.
    :param grid: grid of one group.
    """
    scale, zero = grid.scale[:, 0].float(), grid.zero_point[:, 0].float()
    errors = work.new_empty(stop - start, work.shape[1])
    for column in range(start, stop):
        current = work[column]
        code = ((current / scale).round_() + zero).clamp_(0, grid.highest)
        value = scale * (code - zero) * kept[column]
        error = errors[column - start]
        torch.div(current - value, factor[column, column], out=error)
        later = slice(column + 1, stop)
        work[later].addr_(factor[column, later], error, alpha=-1)
    return errors


def _zero_pruned(work: Tensor, kept: Tensor) -> None:
    """Set pruned weights to zero, in chunks: ``~kept`` is a copy and needs memory."""
    for rows, kept_rows in zip(
        work.split(_COLUMNS_AT_ONCE), kept.split(_COLUMNS_AT_ONCE), strict=True
    ):
        rows.masked_fill_(~kept_rows, 0)
