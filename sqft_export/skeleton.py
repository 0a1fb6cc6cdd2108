"""A model's graph without its weights, for exporters that trace or build one.

Matrices are zeros that were never written, so that the operating system gives them no memory:
a 7B model takes a few hundred megabytes. Everything else (norms, biases, buffers) is real. The
exporter puts the real matrices into the traced graph one by one.
"""

import json
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sqft_export.checkpoint import Checkpoint, copy_companions

PLAIN_ATTENTION = "eager"


def empty_matrix(outputs: int, inputs: int, mark: int, dtype: type = np.float32) -> torch.Tensor:
    """Zeros ``[outputs, inputs]`` that take no memory until they are written.

    :param mark: the first four bytes; tells matrices apart that would else be equal.
    """
    matrix = torch.from_numpy(np.zeros((outputs, inputs), dtype))
    matrix.view(-1).view(torch.uint8)[:4] = torch.tensor([float(mark)]).view(torch.uint8)
    return matrix


def write_config(checkpoint: Checkpoint, folder: Path) -> None:
    """Configs and tokenizer of a packed model as those of a float32 one."""
    copy_companions(checkpoint.folder, folder)
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    config["dtype"] = "float32"
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def empty_model(checkpoint: Checkpoint, attention: str | None = None) -> nn.Module:
    """A float32 model of a checkpoint's architecture without weights; buffers are real.

    :param attention: its implementation; None for the family's.
    """
    config = AutoConfig.from_pretrained(checkpoint.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=attention or checkpoint.family.attention,
        )
    return model.eval().requires_grad_(False)


def skeleton(checkpoint: Checkpoint, attention: str | None = None) -> nn.Module:
    """A float32 model of a checkpoint's architecture whose matrices are empty.

    A matrix is marked with its place in its block: no two of a block are equal, so no optimizer
    takes them for one, and the same one of all blocks is, so that a writer that stores equal
    constants once writes one block.

    :param attention: its implementation; None for the family's.
    """
    model = empty_model(checkpoint, attention)
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
    generation = checkpoint.folder / "generation_config.json"
    if generation.is_file():
        model.generation_config = model.generation_config.from_pretrained(checkpoint.folder)
    return model
