import pytest
import torch

from sqft_export.sparsifiers.allocation import MAX_DEVIATION, allocate, error_curve


def curves(sparsity):
    """Three Linears of different sizes; the second hardly needs half of its inputs."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name, (rows, columns) in {"a": (32, 64), "b": (16, 172), "c": (48, 64)}.items():
        weight = torch.randn(rows, columns, generator=generator)
        norms = torch.rand(columns, generator=generator) + 0.5
        if name == "b":
            norms[::2] *= 0.01
        layers[name] = (weight, norms)
    return layers, {n: error_curve(w, x, sparsity) for n, (w, x) in layers.items()}


def relative_error(weight, norms, sparsity):
    """The loss of a layer, literally: the lowest scores of every row over all its scores."""
    energy = (weight * norms).square()
    count = round(weight.shape[1] * sparsity)
    lowest = energy.sort(dim=1).values[:, :count]
    return float(lowest.double().sum() / energy.double().sum())


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_the_total_is_met_and_no_layer_strays(sparsity):
    layers, found = curves(sparsity)
    shares = allocate(found, sparsity)
    dropped = sum(shares[n] * w.numel() for n, (w, _) in layers.items())
    total = sum(w.numel() for w, _ in layers.values())
    assert abs(dropped - sparsity * total) < 48  # less than a column of the largest
    assert all(abs(share - sparsity) < MAX_DEVIATION + 1 / 64 for share in shares.values())
    assert all(round(share * layers[n][0].shape[1], 6) % 1 == 0 for n, share in shares.items())


def test_it_loses_less_than_a_uniform_share():
    layers, found = curves(0.5)
    shares = allocate(found, 0.5)
    assert shares["b"] > 0.6 > 0.5 > shares["a"]

    def total(of):
        return sum(relative_error(w, x, of[n]) for n, (w, x) in layers.items())

    assert total(shares) < 0.7 * total(dict.fromkeys(layers, 0.5))


def test_curves_are_the_error_of_what_is_dropped():
    layers, found = curves(0.5)
    weight, norms = layers["a"]
    for count, error in zip(found["a"].counts, found["a"].errors, strict=True):
        assert error == pytest.approx(relative_error(weight, norms, count / 64), rel=1e-5)
