"""A model's graph without its weights, for exporters that trace or build one.

Matrices are zeros that were never written, so that the operating system gives them no memory:
a 7B model takes a few hundred megabytes. Everything else (norms, biases, buffers) is real. The
exporter puts the real matrices into the traced graph one by one.
"""

import numpy as np
import torch
from torch import nn

from sqft_export.model.architecture import empty_model, transformers_config
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.contexts import deployed_config

PLAIN_ATTENTION = "eager"


def empty_matrix(outputs: int, inputs: int, mark: int, dtype: type = np.float32) -> torch.Tensor:
    """Zeros ``[outputs, inputs]`` that take no memory until they are written.

    :param mark: the first four bytes; tells matrices apart that would else be equal.
    """
    matrix = torch.from_numpy(np.zeros((outputs, inputs), dtype))
    matrix.view(-1).view(torch.uint8)[:4] = torch.tensor([float(mark)]).view(torch.uint8)
    return matrix


def skeleton(checkpoint: Checkpoint, attention: str | None = None) -> nn.Module:
    """A float32 model of a checkpoint's architecture whose matrices are empty.

    A matrix is marked with its place in its block: no two of a block are equal, so no optimizer
    takes them for one, and the same one of all blocks is, so that a writer that stores equal
    constants once writes one block.

    :param attention: its implementation; None for the family's.
    """
    folder = checkpoint.folder
    made = transformers_config(checkpoint.config, checkpoint.where)
    config = type(made).from_dict(deployed_config(made.to_dict()))
    model = empty_model(config, attention or checkpoint.family.attention)
    blocks = f"{checkpoint.family.blocks}."
    places: dict[str, int] = {}
    for name, parameter in list(model.named_parameters()):
        parent, _, child = name.rpartition(".")
        if parameter.dim() == 2:
            path = name.removeprefix(blocks).partition(".")[2] if blocks in name else name
            outputs, inputs = parameter.shape
            value = empty_matrix(outputs, inputs, places.setdefault(path, len(places) + 1))
        else:
            value = checkpoint.tensor(name).float()
        model.get_submodule(parent)._parameters[child] = nn.Parameter(value, requires_grad=False)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = model.generation_config.from_pretrained(folder)
    return model
