"""Scales stay normal, finite float16 numbers, whatever is fitted or learned."""

import pytest
import torch

from sqft_export.numerics.affine import SMALLEST_SCALE, Grid, fake_quantize, fit_grid, shift_scales

LARGEST = torch.finfo(torch.float16).max


def grid(*scales: float) -> Grid:
    scale = torch.tensor([scales]).half()
    return Grid(scale, torch.full_like(scale, 8, dtype=torch.uint8), 4, 4)


@pytest.mark.parametrize("scale_bits", [11, 7])
@pytest.mark.parametrize("shift", [-200.0, -8.0, -0.5, 0.2, 8.0, 200.0])
def test_learned_scales_stay_in_range_and_keep_their_sign(shift, scale_bits):
    before = grid(SMALLEST_SCALE, 60_000.0, -SMALLEST_SCALE, -60_000.0, 0.01)
    moved = shift_scales(before, torch.full((1, 5), shift), scale_bits)
    assert (moved.scale.abs() >= SMALLEST_SCALE).all() and (moved.scale.abs() <= LARGEST).all()
    assert torch.equal(moved.scale.sign(), before.scale.sign())
    weight = torch.linspace(-1, 1, 20).reshape(1, 20)
    assert torch.isfinite(fake_quantize(weight, moved)).all()


def test_scales_in_range_move_as_they_did():
    generator = torch.Generator().manual_seed(0)
    scale = (torch.rand(64, 8, generator=generator) + 1e-4).half()
    shift = torch.randn(64, 8, generator=generator) * 0.2
    before = Grid(scale, torch.full_like(scale, 8, dtype=torch.uint8), 4, 16)
    assert torch.equal(shift_scales(before, shift).scale, (scale.float() * shift.exp()).half())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [1e-9, 1.0, 65504 * 7.4, 1e9])
def test_fitted_scales_of_few_bits_do_not_round_up_to_infinity(symmetric, size):
    weight = torch.linspace(-1, 1, 64).reshape(1, 64) * size
    found = fit_grid(weight, 4, 32, symmetric, 7)
    assert torch.isfinite(found.scale).all() and (found.scale >= SMALLEST_SCALE).all()
    assert not (found.scale.view(torch.int16) & 0b1111).any()  # seven bits
