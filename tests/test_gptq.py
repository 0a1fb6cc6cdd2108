import pytest
import torch

from sqft_export.numerics.affine import fake_quantize, fit_grid, quantize
from sqft_export.quantizers import gptq, rtn


def layer(outputs=24, inputs=64, seed=0, sparsity=0.5):
    """Weight, mask and the Hessian of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.05
    mask = torch.rand(outputs, inputs, generator=generator) >= sparsity
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    samples = torch.randn(256, inputs, generator=generator) @ (mixing + torch.eye(inputs))
    return weight, mask, samples, samples.T @ samples


def literal_gptq(weight, mask, hessian, bits, group_size, symmetric, damping):
    """Column by column in float64 with the whole inverse, after arXiv 2210.17323, masked."""
    work = (weight * mask).double()
    hessian = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(
        len(hessian), dtype=torch.float64
    )
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    values = torch.zeros_like(work)
    for column in range(weight.shape[1]):
        if column % group_size == 0:
            group = (work * mask)[:, column : column + group_size].float()
            grid = fit_grid(group, bits, group_size, symmetric)
        scale = grid.scale[:, 0].double()
        zero = grid.zero_point[:, 0].double()
        code = ((work[:, column] / scale).round() + zero).clamp(0, 2**bits - 1)
        values[:, column] = scale * (code - zero) * mask[:, column]
        error = (work[:, column] - values[:, column]) / factor[column, column]
        for later in range(column + 1, weight.shape[1]):
            work[:, later] -= error * factor[column, later]
    return values


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("inputs", "group_size"), [(64, 32), (172, 172)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_follows_the_literal_twin(symmetric, inputs, group_size, sparsity):
    weight, mask, _, hessian = layer(inputs=inputs, sparsity=sparsity)
    result, grid = gptq.compress(weight, mask, 4, group_size, symmetric, hessian, 0.01)
    twin = literal_gptq(weight, mask, hessian, 4, group_size, symmetric, 0.01)
    # A weight on the edge between two codes may fall either way in float32 and float64.
    agree = (fake_quantize(result, grid) - twin).abs() < 1e-6
    assert agree.double().mean() > 0.99


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_pruned_weight_keeps_its_zero_code(bits, symmetric):
    weight, mask, _, hessian = layer()
    result, grid = gptq.compress(weight, mask, bits, 32, symmetric, hessian, 0.01)
    zero = grid.zero_point.repeat_interleave(32, dim=1)
    assert (result[~mask] == 0).all()
    assert torch.equal(quantize(result, grid)[~mask], zero[~mask])


@pytest.mark.parametrize(("sparsity", "share"), [(0.0, 0.6), (0.5, 0.95)])
def test_output_error_is_below_rounding_to_nearest(sparsity, share):
    weight, mask, samples, hessian = layer(sparsity=sparsity)

    def output_error(method):
        result, grid = method.compress(weight, mask, 4, 32, True, hessian, 0.01)
        return ((fake_quantize(result, grid) - weight * mask) @ samples.T).square().sum()

    assert output_error(gptq) < share * output_error(rtn)


def test_an_input_that_is_never_active_is_harmless():
    weight, mask, samples, _ = layer()
    samples[:, 5] = 0
    result, _ = gptq.compress(weight, mask, 4, 32, True, samples.T @ samples, 0.01)
    assert torch.isfinite(result).all()
