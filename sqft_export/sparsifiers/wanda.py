"""Wanda (arXiv 2306.11695): magnitude times the norm of the input it multiplies."""

from torch import Tensor

from sqft_export.sparsifiers import Pruning

NEEDS = "norms"


def compress(weight: Tensor, pruning: Pruning, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the lowest ``|W_ij| * ||X_j||_2``; kept weights are not changed."""
    mask = pruning.mask(weight.abs() * inputs)
    return weight.masked_fill(~mask, 0), mask
