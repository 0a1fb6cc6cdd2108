"""``method: existing``: the checkpoint is already sparse, and its zeros are the mask."""

from torch import Tensor

from sqft_export.sparsifiers import Pruning

NEEDS = "nothing"


def compress(weight: Tensor, pruning: Pruning, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weight unchanged, and a mask that is True where it is not zero."""
    return weight, weight != 0
