"""Wanda (arXiv 2306.11695): prune by magnitude times the norm of the input channel."""

from torch import Tensor

from sqft_export.sparsifiers import Pruning

NEEDS = "norms"


def compress(weight: Tensor, pruning: Pruning, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Drop the lowest ``|W_ij| * ||X_j||_2``; the kept weights do not change.

    :param inputs: float32 ``[in]``, L2 norm of every input channel.
    """
    assert inputs is not None  # NEEDS
    mask = pruning.mask(weight.abs() * inputs)
    return weight.masked_fill(~mask, 0), mask
