"""Walk the decoder blocks once, in order, and hand every Linear its inputs.

Each block sees the output of the compressed ones before it. One block is in memory at a time:
its weights are read from the checkpoint, its Linears' inputs go to a collector, the caller
replaces weights, and the block runs again to make the inputs of the next.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from sqft_export.checkpoint import Checkpoint
from sqft_export.errors import UserError

Collector = Callable[[str, Tensor], None]  # full module name, inputs [tokens, in] float32


@dataclass
class Block:
    """A decoder block in memory.

    index: its number.
    linears: full name -> the Linear.
    """

    index: int
    module: nn.Module
    linears: dict[str, nn.Linear]


class _Stop(Exception):
    """Raised by the catcher: the inputs of the first block are known."""


class _Catcher(nn.Module):
    """Stands in for the first block and keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []

    def forward(self, hidden: Tensor, **kwargs: Any) -> None:
        self.calls.append((hidden, kwargs))
        raise _Stop


def _empty_model(checkpoint: Checkpoint) -> nn.Module:
    """The architecture without weights; buffers (rotary frequencies) are real."""
    config = AutoConfig.from_pretrained(checkpoint.folder)
    config.use_cache = False
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def _fill(model: nn.Module, checkpoint: Checkpoint, names: list[str]) -> None:
    for name, tensor in checkpoint.tensors(names):
        if not torch.isfinite(tensor).all():
            file = checkpoint.folder / checkpoint.headers[name].file
            raise UserError(f"{file}: {name}: has NaN or infinite weights")
        set_module_tensor_to_device(model, name, "cpu", tensor, dtype=torch.float32)


def _first_inputs(
    model: nn.Module, checkpoint: Checkpoint, samples: list[Tensor]
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Hidden states and keyword arguments that reach block 0, one entry a sample."""
    embedding = f"{checkpoint.family.embedding}.weight"
    _fill(model, checkpoint, [embedding])
    layers = model.get_submodule(checkpoint.family.blocks)
    first, catcher = layers[0], _Catcher()
    layers[0] = catcher
    for sample in samples:
        with contextlib.suppress(_Stop):
            model(input_ids=sample.unsqueeze(0), use_cache=False)
    layers[0] = first
    set_module_tensor_to_device(model, embedding, "meta")
    return catcher.calls


def _collect(block: Block, calls: list[tuple[Tensor, dict[str, Any]]], collector: Collector):
    """Run the block on every call, each Linear's inputs going to the collector."""

    def hook_of(name: str):
        return lambda _module, args: collector(name, args[0].flatten(0, -2))

    hooks = [
        linear.register_forward_pre_hook(hook_of(name)) for name, linear in block.linears.items()
    ]
    _advance(block, calls)
    for hook in hooks:
        hook.remove()


def _advance(block: Block, calls: list[tuple[Tensor, dict[str, Any]]]) -> list[Tensor]:
    outputs = []
    for hidden, kwargs in calls:
        output = block.module(hidden, **kwargs)
        outputs.append(output[0] if isinstance(output, tuple) else output)
    return outputs


@torch.no_grad()
def walk(
    checkpoint: Checkpoint, samples: list[Tensor], collector: Collector | None
) -> Iterator[Block]:
    """Yield every block after its inputs were collected; change its weights before resuming.

    :param samples: token ids, each int64 ``[length]``; lengths may differ, nothing is padded.
    :param collector: called with ``(name, inputs float32 [tokens, in])``; None when the caller
        needs no activations (nothing is computed then).
    :raises UserError: naming the file and the tensor with NaN or infinite weights.
    """
    model = _empty_model(checkpoint)
    calls = _first_inputs(model, checkpoint, samples) if collector else []
    layers = model.get_submodule(checkpoint.family.blocks)
    for index in range(checkpoint.blocks):
        prefix = f"{checkpoint.family.blocks}.{index}"
        names = checkpoint.block_names(index)
        _fill(model, checkpoint, names)
        module = layers[index]
        linears = {
            f"{prefix}.{name}": child
            for name, child in module.named_modules()
            if isinstance(child, nn.Linear)
        }
        block = Block(index, module, linears)
        if collector:
            _collect(block, calls, collector)
        yield block
        if collector:
            outputs = _advance(block, calls)
            calls = [(out, kwargs) for out, (_, kwargs) in zip(outputs, calls, strict=True)]
        module.to("meta")
