"""Build a model with empty matrices, for exporters that trace or build a graph.

Matrices are zeros that were never written, so the operating system allocates no memory for them:
a 7B model takes a few hundred megabytes. Norms, biases and buffers have their real values. The
exporter inserts the real matrices into the traced graph one by one.
"""

import numpy as np
import torch
from torch import nn

from sqft_export.model.architecture import transformers_config
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.contexts import deployed_config
from sqft_export.model.empty import empty_model

PLAIN_ATTENTION = "eager"


def empty_matrix(outputs: int, inputs: int, mark: int, dtype: type = np.float32) -> torch.Tensor:
    """Create zeros ``[outputs, inputs]`` that take no memory until they are written.

    :param mark: value of the first four bytes, which makes matrices of one shape differ.
    """
    matrix = torch.from_numpy(np.zeros((outputs, inputs), dtype))
    matrix.view(-1).view(torch.uint8)[:4] = torch.tensor([float(mark)]).view(torch.uint8)
    return matrix


def skeleton(checkpoint: Checkpoint, attention: str | None = None) -> nn.Module:
    """Build a float32 model of a checkpoint's architecture with empty matrices.

    A matrix is marked with its position in its block. Matrices of one block therefore differ, and
    no optimizer merges them. Matrices at the same position of all blocks are equal, and a writer
    that stores equal constants once writes only one block.

    :param attention: name of the attention implementation; None for the family's.
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
        weight = nn.Parameter(value, requires_grad=False)
        model.get_submodule(parent).register_parameter(child, weight)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = model.generation_config.from_pretrained(folder)
    return model
