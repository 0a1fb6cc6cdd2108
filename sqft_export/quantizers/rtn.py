"""Round to nearest on a least-squares grid; needs no calibration data."""

from torch import Tensor

from sqft_export.numerics.affine import Grid, fit_grid
from sqft_export.numerics.codes import FLOAT16_BITS

NEEDS = "nothing"


def compress(
    weight: Tensor,
    mask: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    inputs: Tensor | None,
    scale_bits: int = FLOAT16_BITS,
) -> tuple[Tensor, Grid]:
    """Return the weight with exact zeros at pruned positions, and the grid fitted to it."""
    weight = weight.masked_fill(~mask, 0)
    return weight, fit_grid(weight, bits, group_size, symmetric, scale_bits)
