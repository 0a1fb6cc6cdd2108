"""Magnitude pruning: a baseline that needs no calibration data."""

from torch import Tensor

from sqft_export.sparsifiers import Pruning

NEEDS = "nothing"


def compress(weight: Tensor, pruning: Pruning, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Drop the lowest ``|W_ij|``; the kept weights do not change."""
    mask = pruning.mask(weight.abs())
    return weight.masked_fill(~mask, 0), mask
