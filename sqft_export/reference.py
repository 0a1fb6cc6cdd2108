"""What a merged model computes in torch, in float32, with the weights of one module in memory."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate.hooks import attach_align_device_hook
from torch import Tensor

from sqft_export.checkpoint import Checkpoint
from sqft_export.compressed import quantized_names, read_quantized
from sqft_export.numerics.affine import dequantize
from sqft_export.skeleton import empty_model
from sqft_export.targets import read_adapter


class _Weights(Mapping[str, Tensor]):
    """Every weight of a merged model in float32, read when it is asked for."""

    def __init__(self, folder: Path, adapter: Path | None):
        self.checkpoint = Checkpoint(folder)
        self.quantized = set(quantized_names(self.checkpoint))
        self.updates = read_adapter(adapter) if adapter else {}

    def __getitem__(self, name: str) -> Tensor:
        module, _, parameter = name.rpartition(".")
        module = self.checkpoint.stored_name(module)
        if parameter == "weight" and module in self.quantized:
            weight = dequantize(*read_quantized(self.checkpoint, module))
        else:
            weight = self.checkpoint.tensor(f"{module}.{parameter}").float()
        if parameter == "weight" and module in self.updates:
            lora_a, lora_b = map(torch.from_numpy, self.updates[module])
            weight = weight + lora_b @ lora_a
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.shapes)

    def __len__(self) -> int:
        return len(self.checkpoint.shapes)


class Reference:
    """A merged model, with an adapter beside it where one is kept apart."""

    def __init__(self, folder: Path, adapter: Path | None = None):
        weights = _Weights(folder, adapter)
        self.model = empty_model(weights.checkpoint)
        attach_align_device_hook(self.model, torch.device("cpu"), offload=True, weights_map=weights)

    @torch.no_grad()
    def logits(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """float32 ``[length, vocabulary]`` of every sequence; all go through the model at once.

        Shorter ones are filled up on the right, where causal attention does not look.
        """
        ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        found = self.model(input_ids=ids, use_cache=False).logits
        return [one[: len(s)].numpy() for one, s in zip(found, sequences, strict=True)]
