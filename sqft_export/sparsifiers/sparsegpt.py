"""SparseGPT (arXiv 2301.00774): prune blocks of columns and compensate the error.

In every block of columns, the weights with the lowest ``w^2 / U_cc^2`` are dropped. ``U`` is the
upper Cholesky factor of the inverse Hessian. The columns to the right absorb the error. Each row
drops its share within every block, so rows and blocks are equally sparse. An N:M mask is chosen
every M columns, from weights that have absorbed the errors of all columns before them.
"""

import torch
from torch import Tensor

from sqft_export.sparsifiers import Pruning

NEEDS = "factor"
_COLUMNS_AT_ONCE = 128


def compress(weight: Tensor, pruning: Pruning, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the compensated weight with exact zeros, and its mask.

    :param factor: float32 ``[in, in]``, ``U`` of ``numerics.hessian.inverse_factor``.
    """
    assert factor is not None  # NEEDS
    work = weight.T.contiguous()  # transposed, so that an input column is contiguous
    masks = []
    in_features, block = weight.shape[1], pruning.block
    chunk = _COLUMNS_AT_ONCE // block * block or block
    chosen_at_once = block if pruning.n_of_m else chunk
    for start in range(0, in_features, chunk):
        stop = min(start + chunk, in_features)
        errors = weight.new_empty(stop - start, weight.shape[0])
        for first in range(start, stop, chosen_at_once):
            last = min(first + chosen_at_once, stop)
            scores = (work[first:last].T / factor.diagonal()[first:last]).square()
            masks.append(pruning.mask_of_columns(scores, first))
            dropped = (~masks[-1]).T.to(weight.dtype)
            for column in range(first, last):
                error = errors[column - start]
                torch.div(work[column] * dropped[column - first], factor[column, column], out=error)
                work[column:stop].addr_(factor[column, column:stop], error, alpha=-1)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    mask = torch.cat(masks, dim=1)
    return work.T.masked_fill_(~mask, 0), mask
