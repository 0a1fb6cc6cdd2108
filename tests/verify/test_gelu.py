"""GELU as llama.cpp reads it from its table of float16 values."""

import math

import torch
from torch import nn
from transformers.activations import ACT2FN

from sqft_export.verify.gelu import read_gelu_table, use_gelu_table


def literal_gelu(x: float) -> float:
    """The tanh formula in float64."""
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_values_are_those_of_the_nearest_float16():
    x = torch.linspace(-9.9, 9.9, 4001)
    for value, rounded, found in zip(x, x.half(), read_gelu_table(x), strict=True):
        expected = torch.tensor(literal_gelu(float(rounded))).half()
        step = abs(float(expected)) * 2**-10 + 1e-6  # float32 cancels in 1 + tanh
        assert abs(float(found) - float(expected)) <= step, float(value)
        assert float(found) == float(found.half())


def test_large_inputs_skip_the_table():
    x = torch.tensor([-1e6, -10.0, 10.0, 12.34567, 1e6])
    assert read_gelu_table(x).tolist() == [0.0, 0.0, *x[2:].tolist()]


def test_every_gelu_of_a_model_and_nothing_else_is_replaced():
    names = ("gelu", "gelu_new", "gelu_pytorch_tanh", "silu")
    model, x = nn.ModuleList(ACT2FN[name] for name in names), torch.linspace(-3, 3, 50)
    silu = model[3](x)
    use_gelu_table(model)
    assert all(torch.equal(part(x), read_gelu_table(x)) for part in list(model)[:3])
    assert torch.equal(model[3](x), silu)
