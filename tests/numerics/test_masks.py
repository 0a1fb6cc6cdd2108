import math

import pytest
import torch

from sqft_export.numerics.masks import (
    bits_to_mask,
    drop_share,
    keep_at_most,
    keep_n_of_m,
    mask_to_bits,
)


def literal_drop(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The definition, a row and a column at a time."""
    mask = torch.ones(scores.shape, dtype=torch.bool)
    for row in range(scores.shape[0]):
        order = sorted(range(scores.shape[1]), key=lambda c: (float(scores[row, c]), c))
        for column in order[: round(scores.shape[1] * sparsity - 0.5 + 1e-6)]:
            mask[row, column] = False
    return mask


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9])
@pytest.mark.parametrize("columns", [7, 100])
def test_every_row_loses_its_lowest_scores(sparsity, columns):
    scores = torch.rand(5, columns, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    mask = drop_share(scores, sparsity)
    assert torch.equal(mask, literal_drop(scores, sparsity))
    dropped = math.floor(round(columns * sparsity, 6))
    assert ((~mask).sum(dim=1) == dropped).all()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_n_of_m_keeps_the_highest_of_every_m(n, m):
    scores = torch.rand(6, 16, generator=torch.Generator().manual_seed(2))
    mask = keep_n_of_m(scores, n, m)
    for kept, group in zip(mask.reshape(-1, m), scores.reshape(-1, m), strict=True):
        assert int(kept.sum()) == n
        assert group[kept].min() >= group[~kept].max()


def test_n_of_m_refuses_columns_it_does_not_divide():
    with pytest.raises(ValueError, match=r"divisible by 4, found 6"):
        keep_n_of_m(torch.rand(2, 6), 2, 4)
    with pytest.raises(ValueError, match=r"divisible by 4, found 6"):
        keep_at_most(torch.rand(2, 6), 2, 4)


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.75])
def test_no_block_keeps_more_than_at_most_and_the_share_is_met(sparsity):
    scores = torch.rand(16, 256, generator=torch.Generator().manual_seed(4))
    scores[:, :32] += 1  # a block that any mask would keep whole
    mask = drop_share(keep_at_most(scores, 32, 64), sparsity)
    assert ((~mask).sum(dim=1) == int(256 * sparsity)).all()
    assert mask.reshape(16, 4, 64).sum(dim=2).max() <= 32
    if sparsity == 0.5:
        assert torch.equal(mask, keep_n_of_m(scores, 32, 64))


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 172])
def test_packed_mask_is_one_bit_a_weight_and_comes_back(columns):
    mask = torch.rand(5, columns, generator=torch.Generator().manual_seed(3)) < 0.5
    packed = mask_to_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, math.ceil(columns / 8))
    assert torch.equal(bits_to_mask(packed, columns), mask)
    assert bool(packed[0, 0] & 1) == bool(mask[0, 0])
