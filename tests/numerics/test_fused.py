"""One pass in C gives the bits of twenty in torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqft_export.numerics import fused
from sqft_export.numerics.affine import Grid, fit_grid
from sqft_export.numerics.masks import mask_to_bits

WORDS = {4: torch.int32, 2: torch.int16}


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(WORDS[tensor.itemsize])


def both(monkeypatch, call):
    """Results of the library and of torch for the same call."""
    assert fused._library() is not None, "was not built; a compiler is expected where tests run"
    ours = call()
    with monkeypatch.context() as without:
        without.setattr(fused, "_library", lambda: None)
        return ours, call()


def a_base(rows, inputs, group, bits, symmetric, masked, dtype, generator) -> fused.Frozen:
    """Weights of which some lie outside of the grid, and a group of zeros."""
    weight = torch.randn(rows, inputs, generator=generator) * 0.05
    mask = torch.rand(rows, inputs, generator=generator) < 0.5
    mask[0] = False
    weight = (weight * mask if masked else weight).to(dtype)
    grid = None
    if group:
        found = fit_grid(weight, bits, group, symmetric)
        grid = Grid((found.scale.float() * 0.7).half(), found.zero_point, bits, group)
    return fused.Frozen(weight, mask_to_bits(mask) if masked else None, grid)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    group=st.sampled_from([16, 32, 64, 128, 20, 300, 1000, None]),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    product=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**20),
)
def test_compiled_is_bit_equal_to_torch(
    rows, groups, group, bits, symmetric, masked, dtype, product, threads, seed
):
    generator = torch.Generator().manual_seed(seed)
    # A group that is no multiple of eight is a whole row: masks are packed by the byte.
    inputs = group * groups if group and group % 8 == 0 else group or 44 + groups
    base = a_base(rows, inputs, group, bits, symmetric, masked, dtype, generator)
    update = torch.randn(rows, inputs, generator=generator) * 0.03
    gradient = torch.randn(rows, inputs, generator=generator).to(product)

    def call():
        back = fused.backward(base, update.clone(), 1.7, gradient.clone(), group is not None)
        return (
            fused.effective_weight(base, update.clone(), 1.7, product),
            fused.effective_weight(base, None, 0.0, product),
            *(part for part in back if part is not None),
        )

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            ours, theirs = both(monkeypatch, call)
    finally:
        torch.set_num_threads(before)
    assert len(ours) == (5 if group else 4)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(bits_of(one), bits_of(other))


def test_an_update_too_large_is_clamped_and_gets_no_gradient(monkeypatch):
    base = a_base(8, 64, 32, 4, True, True, torch.float32, torch.Generator().manual_seed(0))
    update, gradient = torch.full((8, 64), 9.0), torch.ones(8, 64)

    def call():
        return fused.backward(base, update.clone(), 1.0, gradient.clone(), True)

    for found in both(monkeypatch, call):
        assert (found.update_gradient == 0).all()
        assert found.effective.abs().max() > 0


def test_weights_that_are_not_in_one_piece_go_through_torch(monkeypatch):
    base = a_base(32, 64, 32, 4, True, False, torch.float32, torch.Generator().manual_seed(0))
    turned = fused.Frozen(base.weight.T.contiguous().T, None, base.grid)
    monkeypatch.setattr(fused, "_run", lambda *_: pytest.fail("reads rows that are none"))
    assert torch.equal(
        fused.effective_weight(turned, torch.zeros(32, 64), 1.0),
        fused.effective_weight(turned, None, 1.0),
    )
