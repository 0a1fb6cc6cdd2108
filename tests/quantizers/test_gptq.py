import pytest
import torch

from sqft_export.numerics.affine import fake_quantize, fit_grid, quantize
from sqft_export.numerics.hessian import inverse_factor
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
    result, grid = gptq.compress(
        weight, mask, 4, group_size, symmetric, inverse_factor(hessian.clone(), 0.01)
    )
    twin = literal_gptq(weight, mask, hessian, 4, group_size, symmetric, 0.01)
    # A weight on the edge between two codes may fall either way in float32 and float64.
    agree = (fake_quantize(result, grid) - twin).abs() < 1e-6
    assert agree.double().mean() > 0.99


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_pruned_weight_keeps_its_zero_code(bits, symmetric):
    weight, mask, _, hessian = layer()
    factor = inverse_factor(hessian, 0.01)
    result, grid = gptq.compress(weight, mask, bits, 32, symmetric, factor)
    zero = grid.zero_point.repeat_interleave(32, dim=1)
    assert (result[~mask] == 0).all()
    assert torch.equal(quantize(result, grid)[~mask], zero[~mask])


@pytest.mark.parametrize(("sparsity", "share"), [(0.0, 0.6), (0.5, 0.95)])
def test_output_error_is_below_rounding_to_nearest(sparsity, share):
    weight, mask, samples, hessian = layer(sparsity=sparsity)

    factor = inverse_factor(hessian, 0.01)

    def output_error(method):
        result, grid = method.compress(weight, mask, 4, 32, True, factor)
        return ((fake_quantize(result, grid) - weight * mask) @ samples.T).square().sum()

    assert output_error(gptq) < share * output_error(rtn)


def test_an_input_that_is_never_active_is_harmless():
    weight, mask, samples, _ = layer()
    samples[:, 5] = 0
    factor = inverse_factor(samples.T @ samples, 0.01)
    result, _ = gptq.compress(weight, mask, 4, 32, True, factor)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("size", [1, 5, 600])
def test_the_factor_is_that_of_the_inverse(size):
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(2 * size, size, generator=generator)
    samples[:, 0] = 0
    hessian = samples.T @ samples
    twin = hessian.double()
    twin[0, 0] = 1
    twin += 0.01 * twin.diagonal().mean() * torch.eye(size)
    expected = torch.linalg.cholesky(torch.linalg.inv(twin), upper=True)
    found = inverse_factor(hessian, 0.01)
    assert found.data_ptr() == hessian.data_ptr()  # a 14336-wide one is 784 MiB: never twice
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


def test_a_hessian_that_float32_cannot_factor_gets_more_damping():
    hessian = torch.full((50, 50), 1e6)
    hessian[0, 0] = 1
    with pytest.warns(UserWarning, match="damping raised"):
        assert torch.isfinite(inverse_factor(hessian, 1e-9)).all()
