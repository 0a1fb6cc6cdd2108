"""Magnitude: the baseline that looks at no data."""

from torch import Tensor

from sqft_export.sparsifiers import Pruning

NEEDS = "nothing"


def compress(weight: Tensor, pruning: Pruning, inputs: None) -> tuple[Tensor, Tensor]:
    """Drop the lowest ``|W_ij|``; kept weights are not changed."""
    mask = pruning.mask(weight.abs())
    return weight.masked_fill(~mask, 0), mask
