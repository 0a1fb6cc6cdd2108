"""A quantized weight is the same in torch and in numpy."""

import numpy as np
import torch

from sqft_export.numerics.affine import dequantize, fit_grid, quantize
from sqft_export.numerics.codes import Grid, QuantizedWeight, from_arrays, join_rows


def weight(bits=4, group_size=32, symmetric=False, seed=0) -> QuantizedWeight[torch.Tensor]:
    floats = torch.randn(6, 128, generator=torch.Generator().manual_seed(seed)) * 0.05
    grid = fit_grid(floats, bits, group_size, symmetric)
    return QuantizedWeight(quantize(floats, grid), grid)


def literal_floats(stored: QuantizedWeight[np.ndarray]) -> np.ndarray:
    """``s * (q - z)``, number by number."""
    found = np.empty(stored.codes.shape, np.float32)
    for row, column in np.ndindex(*found.shape):
        group = column // stored.grid.group_size
        step = int(stored.codes[row, column]) - int(stored.zero_point[row, group])
        found[row, column] = np.float32(stored.scale[row, group]) * np.float32(step)
    return found


def test_numpy_and_torch_hold_the_same_numbers():
    for bits, group_size, symmetric in ((4, 32, False), (8, 128, True)):
        ours = weight(bits, group_size, symmetric)
        stored = ours.numpy()
        assert (stored.bits, stored.grid.group_size) == (bits, group_size)
        assert stored.grid.symmetric == ours.grid.symmetric == symmetric
        assert np.array_equal(literal_floats(stored), dequantize(*ours).numpy())


def test_more_groups_repeat_their_numbers_and_change_no_weight():
    stored = weight().numpy()
    split = stored.in_groups(8)
    assert split.grid.group_size == 16 and split.scale.shape == (6, 8)
    assert np.array_equal(literal_floats(split), literal_floats(stored))
    assert stored.in_groups(6) is stored  # not a multiple of 4 groups


def test_rows_that_are_cut_apart_are_joined_again():
    stored = weight().numpy()
    joined = join_rows([stored.rows(slice(0, 2)), stored.rows(slice(2, 6))])
    for part in ("codes", "scale", "zero_point"):
        assert np.array_equal(getattr(joined, part), getattr(stored, part)), part
    assert (joined.bits, joined.grid.group_size) == (4, 32)


def test_a_weight_of_bits_that_few_codes_use_is_read_with_its_bits():
    """INT8 codes below 16 are INT8 codes."""
    codes, numbers = np.full((2, 64), 3, np.uint8), np.ones((2, 2), np.float16)
    stored = from_arrays(codes, numbers, numbers.astype(np.uint8), 8)
    assert stored.grid == Grid(stored.scale, stored.zero_point, 8, 32)
    assert stored.grid.highest == 255
