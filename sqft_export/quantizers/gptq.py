"""Mask-aware GPTQ.

GPTQ (arXiv 2210.17323) rounds one input column at a time and lets the columns not yet rounded
absorb the error ``e = (w - w_hat) / U_cc`` by ``w_j -= e * U_cj``, where ``U`` is the upper
Cholesky factor of the inverse Hessian ``H = X^T X``. On a pruned layer the update brings zeros
back. Here a pruned weight may take such updates until its column is reached; there it returns to
zero, and what it had taken is handed on, as its error, to the columns after it. So every zero is
kept and the kept weights of the row absorb all of the error (SparseGPT's view, arXiv 2301.00774,
with the mask given).

What is returned is the *compensated* weight, each column as it stood when it was rounded. Its
codes on the grid are GPTQ's codes, and training starts from it with nothing thrown away.
"""

import torch
from torch import Tensor

from sqft_export.numerics.affine import Grid, fit_grid
from sqft_export.numerics.codes import FLOAT16_BITS

NEEDS = "factor"
_COLUMNS_AT_ONCE = 128  # the update of later columns is one matrix product per so many


def compress(
    weight: Tensor,
    mask: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    factor: Tensor,
    scale_bits: int = FLOAT16_BITS,
) -> tuple[Tensor, Grid]:
    """Compensated weight and grid of one Linear.

    :param weight: float32 ``[out, in]``.
    :param mask: bool ``[out, in]``, True = kept.
    :param factor: float32 ``[in, in]``, ``U`` as ``numerics.hessian.inverse_factor`` makes it.
    :return: float32 ``[out, in]`` with exact zeros where pruned, and its grid, each group fitted
        to the weights as they stand when its first column is reached.
    """
    # One input column of all rows is what every step touches, so it lies in one piece.
    work, kept = weight.T.contiguous(), mask.T
    _drop(work, kept)
    fitted: list[Grid] = []
    in_features = weight.shape[1]
    chunk = min(group_size, _COLUMNS_AT_ONCE)  # so that a group starts only where a chunk does
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
    _drop(work, kept)
    return work.T, Grid(scales, zero_points, bits, group_size)


def _round_columns(
    work: Tensor, kept: Tensor, start: int, stop: int, grid: Grid, factor: Tensor
) -> Tensor:
    """Round columns one by one, those up to ``stop`` absorbing; errors ``[stop - start, out]``.

    :param work: float32 ``[in, out]``; :param kept: bool of that shape.
    :param grid: one group.
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


def _drop(work: Tensor, kept: Tensor) -> None:
    """Set what is not kept to zero, a few rows at a time: the inverse of a mask is a copy too."""
    for rows, kept_rows in zip(
        work.split(_COLUMNS_AT_ONCE), kept.split(_COLUMNS_AT_ONCE), strict=True
    ):
        rows.masked_fill_(~kept_rows, 0)
