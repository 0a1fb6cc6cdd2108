"""Given: the checkpoint is sparse already; its zeros are the mask, taken here once."""

from torch import Tensor

from sqft_export.sparsifiers import Pruning

NEEDS = "nothing"


def compress(weight: Tensor, pruning: Pruning, inputs: None) -> tuple[Tensor, Tensor]:
    """The weight as it is, and where it is not zero."""
    return weight, weight != 0
