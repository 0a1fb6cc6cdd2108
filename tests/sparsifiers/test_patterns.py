"""SparseGPT's N:M masks, after IST-DASLab/sparsegpt (`fasterprune` with prunen and prunem)."""

import pytest
import torch

from sqft_export.numerics.hessian import inverse_factor
from sqft_export.sparsifiers import Pruning, sparsegpt


def literal_fasterprune(weight, hessian, kept, of, blocksize=128):
    """Column by column in float64: the mask of every ``of`` columns on weights as they stand."""
    hessian = hessian.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    work, mask = weight.double().clone(), torch.ones(weight.shape, dtype=torch.bool)
    for i1 in range(0, weight.shape[1], blocksize):
        i2 = min(i1 + blocksize, weight.shape[1])
        errors = torch.zeros(weight.shape[0], i2 - i1).double()
        for column in range(i1, i2):
            if column % of == 0:
                square = work[:, column : column + of] ** 2
                scores = square / factor.diagonal()[column : column + of] ** 2
                lowest = scores.topk(of - kept, dim=1, largest=False).indices
                mask.scatter_(1, column + lowest, False)
            error = work[:, column] * ~mask[:, column] / factor[column, column]
            work[:, column:i2] -= error[:, None] * factor[column, column:i2]
            errors[:, column - i1] = error
        work[:, i2:] -= errors @ factor[i1:i2, i2:]
    return work * mask, mask


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8), (1, 4), (16, 32)])
@pytest.mark.parametrize("inputs", [96, 320])
def test_a_pattern_is_chosen_on_weights_that_absorbed_the_errors_before(kept, of, inputs):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(16, inputs, generator=generator) * 0.05
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    samples = torch.randn(512, inputs, generator=generator) @ mixing
    hessian = samples.T @ samples
    rule = Pruning(None, (kept, of))
    result, mask = sparsegpt.compress(weight, rule, inverse_factor(hessian.clone(), 0.01))
    twin, twin_mask = literal_fasterprune(weight, hessian, kept, of)
    assert (mask == twin_mask).float().mean() > 0.995
    same = (mask == twin_mask).all(dim=1)
    assert same.float().mean() > 0.8
    torch.testing.assert_close(result[same].double(), twin[same], rtol=1e-3, atol=1e-5)
