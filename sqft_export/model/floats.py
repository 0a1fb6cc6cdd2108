"""Float models of quantized checkpoints: whole, or the weights of one module at a time."""

from collections.abc import Container, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate.hooks import attach_align_device_hook
from torch import Tensor, nn

from sqft_export.errors import UserError
from sqft_export.model.architecture import empty_model, transformers_config
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.storage import plain_names, quantized_names, read_quantized
from sqft_export.numerics.affine import dequantize
from sqft_export.run.device import CPU

KEPT_BYTES = 2**29  # of logits
LowRank = dict[str, tuple[np.ndarray, np.ndarray]]


class _Weights(Mapping[str, Tensor]):
    """Every weight of a merged model in float32, read when it is asked for."""

    def __init__(self, folder: Path, updates: LowRank):
        self.checkpoint = Checkpoint(folder)
        self.quantized = set(quantized_names(self.checkpoint))
        self.updates = updates

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


def streamed_model(
    checkpoint: Checkpoint, weights: Mapping[str, Tensor], device: torch.device
) -> nn.Module:
    """A model that reads the weights of a module when it is called, and forgets them after."""
    config = transformers_config(checkpoint.config, checkpoint.where)
    model = empty_model(config, checkpoint.family.attention)
    attach_align_device_hook(model, device, offload=True, weights_map=weights)
    return model


class Reference:
    """What a merged model computes in torch, in float32, one module's weights in memory.

    :param updates: Linear -> ``A`` float32 ``[rank, in]`` and ``B`` ``[out, rank]`` of an adapter
        that was not merged, its scaling within ``B``.
    :param device: where it computes.
    """

    def __init__(self, folder: Path, updates: LowRank | None = None, device: torch.device = CPU):
        weights = _Weights(folder, updates or {})
        self.model = streamed_model(weights.checkpoint, weights, device)
        self.device = device
        self.kept: dict[str, list[np.ndarray]] = {}

    def logits(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """float32 ``[length, vocabulary]`` of every sequence; all go through the model at once.

        Kept while there is room: one runtime after the other says the same.
        """
        asked = repr(sequences)
        if asked in self.kept:
            return self.kept[asked]
        found = self._computed(sequences)
        kept = sum(one.nbytes for every in (*self.kept.values(), found) for one in every)
        if kept <= KEPT_BYTES:
            self.kept[asked] = found
        return found

    @torch.no_grad()
    def _computed(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """Shorter ones are filled up on the right, where causal attention does not look."""
        ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        found = self.model(input_ids=ids.to(self.device), use_cache=False).logits.cpu()
        return [one[: len(s)].numpy() for one, s in zip(found, sequences, strict=True)]


def float_tensors(
    checkpoint: Checkpoint, without: Container[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a model as floats: stored ones as they are, quantized ones dequantized."""
    quantized = quantized_names(checkpoint)
    leave = {f"{name}.weight" for name in quantized}
    plain = (n for n in plain_names(checkpoint) if n not in leave and n not in without)
    yield from checkpoint.tensors(plain)
    for name in quantized:
        if f"{name}.weight" not in without:
            yield f"{name}.weight", dequantize(*read_quantized(checkpoint, name))


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = torch.float32,
    instead: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """A merged or plain model, in evaluation mode.

    :param dtype: of its weights; None: as they are stored, mapped from the files until they are
        looked at.
    :param instead: name of a Linear -> what takes its place; its weight is not read.
    """
    config = transformers_config(checkpoint.config, checkpoint.where)
    model, instead = empty_model(config, checkpoint.family.attention), instead or {}
    for name, module in instead.items():
        model.set_submodule(name, module)
    for name, tensor in float_tensors(checkpoint, {f"{name}.weight" for name in instead}):
        parent, _, child = name.rpartition(".")
        value = nn.Parameter(tensor if dtype is None else tensor.to(dtype), requires_grad=False)
        model.get_submodule(parent)._parameters[child] = value
    model.tie_weights()
    if missing := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise UserError(f"{checkpoint.folder}: {missing[0]} is not stored")
    if (checkpoint.folder / "generation_config.json").is_file():
        generation = model.generation_config.from_pretrained(checkpoint.folder)
        model.generation_config = generation
    return model.eval()
