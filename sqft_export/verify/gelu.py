"""GELU as llama.cpp computes it on a CPU: from a table with the value of every float16.

The input is rounded to float16, and so is the value of the tanh formula. Inputs up to -10 give
zero, those from 10 on themselves. This is written here from that description.
"""

import torch
from torch import Tensor, nn

_TABLE_END = 10.0


def read_gelu_table(x: Tensor) -> Tensor:
    """Return GELU of float32 values, with the input and the result rounded to float16."""
    value = nn.functional.gelu(x.half().float(), approximate="tanh").half().to(x.dtype)
    value = torch.where(x <= -_TABLE_END, torch.zeros_like(x), value)
    return torch.where(x >= _TABLE_END, x, value)


def use_gelu_table(model: nn.Module) -> None:
    """Let every GELU of a model read the table from now on."""
    for module in model.modules():
        if "gelu" in type(module).__name__.lower():
            module.forward = read_gelu_table
