"""The importance matrix of llama.cpp's quantizer, from activations in torch."""

import numpy as np
import torch
from torch import Tensor

from sqft_export.model.architecture import transformers_config
from sqft_export.model.blocks import Inputs, walk
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.targets.gguf.architectures import naming_of


@torch.no_grad()
def importance_matrix(
    checkpoint: Checkpoint, samples: list[Tensor], device: torch.device
) -> dict[str, np.ndarray]:
    """Return tensor name in llama.cpp -> mean squared input, float32 ``[in]``.

    ``llama-imatrix`` computes the same. Linears without a separate tensor, such as those of single
    experts, are left out.

    :param samples: token ids, each int64 ``[length]``.
    """
    config = transformers_config(checkpoint.config, checkpoint.where).to_dict()
    names, inputs = naming_of(config), Inputs("norms")
    tokens = sum(len(sample) for sample in samples)
    found = {}
    for block in walk(checkpoint, samples, inputs.collector, device):
        for module in block.linears:
            norms = inputs.take(module)
            assert norms is not None
            try:
                tensors = names.tensors_of(module, checkpoint.linears[module][0])
            except KeyError:
                continue
            mean = norms.square() / tokens
            for tensor, _ in tensors:
                found[f"{tensor}.weight"] = np.ascontiguousarray(mean.cpu().numpy(), np.float32)
    return found
