import pytest
import torch

from sqft_export.numerics.affine import (
    SMALLEST_SCALE,
    Grid,
    dequantize,
    fake_quantize,
    fake_quantize_inside,
    fit_grid,
    quantize,
    replace_zero_scales,
    widen_to_4_bits,
)
from sqft_export.numerics.codes import QuantizedWeight
from sqft_export.numerics.groups import fallback_group_size

GRIDS = [(4, True), (4, False), (8, True), (8, False)]


def weights(outputs=6, inputs=128, seed=0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def literal_codes(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The formula of the grid, one weight at a time; Python's round is half to even too."""
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            group = column // grid.group_size
            scale = grid.scale[row, group].float()
            step = round((weight[row, column] / scale).item())
            code = step + int(grid.zero_point[row, group])
            codes[row, column] = min(max(code, 0), 2**grid.bits - 1)
    return codes


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("group_size", [32, 128])
def test_codes_and_values_are_the_formula(bits, symmetric, group_size):
    weight = weights()
    grid = fit_grid(weight, bits, group_size, symmetric)
    codes = quantize(weight, grid)
    assert torch.equal(codes, literal_codes(weight, grid))
    group = torch.arange(128) // group_size
    expected = grid.scale[:, group].float() * (codes.float() - grid.zero_point[:, group].float())
    assert torch.equal(dequantize(codes, grid), expected)


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_zero_is_on_the_grid_exactly(bits, symmetric):
    weight = weights()
    weight[:, ::2] = 0
    grid = fit_grid(weight, bits, 32, symmetric)
    zero = grid.zero_point.repeat_interleave(32, dim=1)
    assert torch.equal(quantize(weight, grid)[:, ::2], zero[:, ::2])
    assert (fake_quantize(weight, grid)[:, ::2] == 0).all()
    assert grid.symmetric == symmetric


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_fewer_than_four_bits_are_stored_among_four_bit_codes(bits, symmetric):
    weight = weights()
    grid = fit_grid(weight, bits, 32, symmetric)
    codes = quantize(weight, grid)
    assert int(codes.max()) < 2**bits
    held, four = widen_to_4_bits(QuantizedWeight(codes, grid))
    assert four.bits == 4 and four.symmetric == symmetric and int(held.max()) < 16
    assert torch.equal(dequantize(held, four), dequantize(codes, grid))
    assert torch.equal(quantize(dequantize(codes, grid), four), held)


@pytest.mark.parametrize("bits", [4, 8])
def test_other_codes_are_stored_as_they_are(bits):
    grid = fit_grid(weights(), bits, 32, True)
    codes = quantize(weights(), grid)
    held, same = widen_to_4_bits(QuantizedWeight(codes, grid))
    assert held is codes and same is grid


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_grid_points_are_fixed_points(bits, symmetric):
    grid = fit_grid(weights(), bits, 32, symmetric)
    rounded = fake_quantize(weights(), grid)
    assert torch.equal(fake_quantize(rounded, grid), rounded)


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_fitted_grid_is_not_worse_than_the_full_range(bits, symmetric):
    weight = weights()
    grid = fit_grid(weight, bits, 32, symmetric)
    groups = weight.reshape(6, -1, 32)
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    width = 2 * torch.maximum(-low, high) if symmetric else high - low
    scale = (width / (2**bits - 1)).half()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round()
    plain = Grid(scale, zero.to(torch.uint8), bits, 32)
    error, plain_error = ((fake_quantize(weight, g) - weight).square().sum() for g in (grid, plain))
    assert error <= plain_error


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_the_short_way_gives_the_points_of_the_codes(bits, symmetric):
    weight = weights() * 3  # some clamped
    grid = fit_grid(weights(), bits, 32, symmetric)
    points = dequantize(quantize(weight, grid), grid)
    assert torch.equal(fake_quantize(weight, grid), points)
    values, inside = fake_quantize_inside(weight, grid)
    assert torch.equal(values, points) and not inside.all()


def test_a_group_of_zeros_stays_zero():
    grid = fit_grid(torch.zeros(2, 32), 4, 32, True)
    assert (grid.scale == SMALLEST_SCALE).all()
    assert (fake_quantize(torch.zeros(2, 32), grid) == 0).all()


def test_inside_is_where_the_code_was_not_clamped():
    grid = Grid(torch.ones(1, 1).half(), torch.full((1, 1), 8, dtype=torch.uint8), 4, 4)
    weight = torch.tensor([[-8.4, -8.6, 7.4, 7.6]])
    _, inside = fake_quantize_inside(weight, grid)
    assert inside.tolist() == [[True, False, True, False]]


@pytest.mark.parametrize(
    ("inputs", "asked", "given"),
    [(128, 64, 64), (160, 64, 32), (176, 64, 16), (172, 64, 172), (96, 128, 32), (64, None, 64)],
)
def test_group_size_that_does_not_divide_falls_back(inputs, asked, given):
    assert fallback_group_size(inputs, asked) == given


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_a_scale_of_zero_becomes_a_group_of_zeros_of_the_same_values(bits, symmetric):
    grid = fit_grid(weights(), bits, 32, symmetric)
    codes = quantize(weights(), grid)
    grid.scale[2, 1] = 0
    ours, held = replace_zero_scales(QuantizedWeight(codes, grid))
    assert torch.equal(dequantize(ours, held), dequantize(codes, grid))
    assert (held.scale > 0).all()
    assert (fake_quantize(dequantize(ours, held), held) == dequantize(codes, grid)).all()
    untouched = torch.ones(6, 128, dtype=torch.bool)
    untouched[2, 32:64] = False
    assert torch.equal(ours[untouched], codes[untouched])


@pytest.mark.parametrize("scale", [torch.nan, torch.inf])
def test_a_scale_that_is_no_number_is_refused(scale):
    grid = fit_grid(weights(), 4, 32, True)
    grid.scale[2, 1] = scale
    with pytest.raises(ValueError, match="1 of 24 scales are NaN or infinite in float16"):
        replace_zero_scales(QuantizedWeight(quantize(weights(), grid), grid))
