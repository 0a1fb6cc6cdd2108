"""Walk the decoder blocks once, in order, and hand every Linear its inputs.

Each block sees the output of the compressed ones before it. One block is in memory at a time:
its weights are read from the checkpoint, its Linears' inputs go to a collector, the caller
replaces weights, and the block runs again to make the inputs of the next.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from sqft_export.errors import UserError
from sqft_export.model.architecture import empty_model, transformers_config
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.coverage import check_finite, check_sum, count_tokens, no_tokens
from sqft_export.numerics.hessian import inverse_factor
from sqft_export.run.device import CPU

Collector = Callable[[str, Tensor], None]  # full module name, float32 inputs [..., in]


class Inputs:
    """What a method needs of the calibration inputs of the block at hand.

    Linears that are handed the same tensor (q, k and v; gate and up) share one sum.

    needs: "nothing", "norms" (float32 ``[in]``, the L2 norm of every input channel), "hessian"
        (float32 ``[in, in]``, ``X^T X`` over all tokens) or "factor" (its
        :func:`~sqft_export.numerics.hessian.inverse_factor`).
    damping: of the factor.
    """

    def __init__(self, needs: str, damping: float = 0.01):
        self.needs, self.damping = needs, damping
        self._last: tuple[str, Tensor] | None = None
        self._owner: dict[str, str] = {}  # Linear -> the first one of those that share its sum
        self._sums: dict[str, Tensor] = {}
        self._ready: set[str] = set()  # owners whose sum was turned into what is taken

    @property
    def has_hessian(self) -> bool:
        return self.needs in ("hessian", "factor")

    @property
    def collector(self) -> Collector | None:
        return None if self.needs in ("nothing", "block") else self._add

    def _add(self, name: str, inputs: Tensor) -> None:
        if self._last is not None and inputs is self._last[1]:
            self._owner[name] = self._last[0]
            return
        self._last, self._owner[name] = (name, inputs), name
        x = inputs.flatten(0, -2)
        if name not in self._sums:
            channels = x.shape[1]
            self._sums[name] = x.new_zeros((channels,) * (1 if self.needs == "norms" else 2))
        if self.needs == "norms":
            self._sums[name] += x.square().sum(dim=0)
        else:
            self._sums[name].addmm_(x.T, x)

    def take(self, name: str) -> Tensor | None:
        """What was gathered for one Linear, which is then forgotten; None if nothing is needed.

        :raises UserError: naming the Linear, if it saw no token, or its inputs are NaN, infinite or
            all zero.
        """
        if self.collector is None:
            return None
        if name not in self._owner:
            raise no_tokens(name)
        if self._last is not None:  # the first of a block
            self._check_sums()
        owner = self._owner.pop(name)
        total = self._sums[owner]
        if owner not in self._ready:
            self._ready.add(owner)
            self._finish(name, total)
        if owner not in self._owner.values():
            self._ready.remove(owner)
            del self._sums[owner]
        return total

    def _check_sums(self) -> None:
        """Check every sum once, in the order of the calls, so that the first fault is named."""
        self._last = None
        for owner, total in self._sums.items():
            check_sum(owner, total.diagonal() if total.dim() == 2 else total)

    def _finish(self, name: str, total: Tensor) -> None:
        """Turn a sum, in place, into what is taken."""
        if self.needs == "norms":
            total.sqrt_()
        elif self.needs == "factor":
            try:
                inverse_factor(total, self.damping)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from error

    def forget(self) -> None:
        """What was gathered and not taken."""
        self._last = None
        for gathered in (self._owner, self._sums, self._ready):
            gathered.clear()


@dataclass
class Block:
    """A decoder block in memory.

    index: its number.
    linears: full name -> the Linear; the widest first, so that a method which takes their inputs
        one by one is soon rid of the largest sum.
    calls: hidden states ``[1, length, hidden]`` and keyword arguments it is called with, one
        entry a sample.
    """

    index: int
    module: nn.Module
    linears: dict[str, nn.Linear]
    calls: list[tuple[Tensor, dict[str, Any]]]


class _Stop(Exception):
    """Raised by the last catcher: what every block is called with is known."""


class _Catcher(nn.Module):
    """Stands in for a block and keeps what it is called with.

    :param wraps: whether the block returns its hidden states in a tuple; None: nothing comes after.
    """

    def __init__(self, block: nn.Module, wraps: bool | None):
        super().__init__()
        # Models ask their blocks for more than to be called, such as what kind of mask they want.
        self.__dict__ |= {k: v for k, v in vars(block).items() if not k.startswith("_")}
        self.wraps = wraps
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor | tuple[Tensor]:
        self.calls.append((hidden, kwargs))
        if self.wraps is None:
            raise _Stop
        return (hidden,) if self.wraps else hidden


def _check_complete(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Every decoder weight must be stored under its own name: a mask or grid belongs to one.

    Embedding and head may be one tensor; nothing here changes them.
    """
    blocks = f"{checkpoint.family.blocks}."
    missing = [
        name
        for name, _ in model.named_parameters()
        if name.startswith(blocks) and name not in checkpoint.headers
    ]
    if missing:
        raise UserError(
            f"{checkpoint.folder}: {missing[0]} is not stored ({len(missing)} missing in all); a "
            "weight tied to another block's, or left out, can't be compressed"
        )


def _fill(model: nn.Module, checkpoint: Checkpoint, names: list[str], device: torch.device) -> None:
    known = model.state_dict().keys()  # old checkpoints store buffers that are computed now
    for name, tensor in checkpoint.tensors([name for name in names if name in known]):
        if not torch.isfinite(tensor).all():
            file = checkpoint.folder / checkpoint.headers[name].file
            raise UserError(f"{file}: {name}: has NaN or infinite weights")
        set_module_tensor_to_device(model, name, device, tensor, dtype=torch.float32)


def _caught(
    model: nn.Module, layers: Any, samples: list[Tensor], wraps: list[bool | None]
) -> list[list[tuple[Tensor, dict[str, Any]]]]:
    """What the first blocks are called with, block by block and sample by sample."""
    blocks = list(layers[: len(wraps)])
    catchers = [_Catcher(block, one) for block, one in zip(blocks, wraps, strict=True)]
    for index, catcher in enumerate(catchers):
        layers[index] = catcher
    for sample in samples:
        with contextlib.suppress(_Stop):
            model(input_ids=sample.unsqueeze(0), use_cache=False)
    for index, block in enumerate(blocks):
        layers[index] = block
    return [catcher.calls for catcher in catchers]


def _first_inputs(
    model: nn.Module, checkpoint: Checkpoint, samples: list[Tensor], device: torch.device
) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    """Hidden states that reach block 0, and keyword arguments of every block, a sample each.

    Blocks of one model may differ in theirs: Gemma's take turns at a window of attention.
    """
    family = checkpoint.family
    layers = model.get_submodule(family.blocks)
    if not samples:
        return [], [[] for _ in layers]
    before = [n for n in checkpoint.outer_names() if not n.startswith(f"{family.head}.")]
    _fill(model, checkpoint, before, device)
    # A block is run once, only to see what it returns.
    [[(hidden, kwargs)]] = _caught(model, layers, samples[:1], [None])
    _fill(model, checkpoint, checkpoint.block_names(0), device)
    wraps = isinstance(layers[0](hidden, **kwargs), tuple)
    calls = _caught(model, layers, samples, [wraps] * (len(layers) - 1) + [None])
    for module in (model.get_submodule(name.rpartition(".")[0]) for name in before):
        module.to("meta")
    return [hidden for hidden, _ in calls[0]], [[kwargs for _, kwargs in c] for c in calls]


def _collect(block: Block, collector: Collector) -> None:
    """Run the block on its inputs, each Linear's going to the collector."""

    def hook_of(name: str):
        return lambda _module, args: collector(name, args[0])

    hooks = [
        linear.register_forward_pre_hook(hook_of(name)) for name, linear in block.linears.items()
    ]
    for hidden, kwargs in block.calls:
        block.module(hidden, **kwargs)
    for hook in hooks:
        hook.remove()


def output_of(module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Hidden states that a block gives; some return them in a tuple."""
    output = module(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _advance(block: Block, tokens: dict[str, int]) -> list[Tensor]:
    """The block's outputs, each in place of its input.

    :param tokens: filled with the tokens that each Linear saw, if the block is called at all.
    :raises UserError: naming the block whose output is not finite, or the Linear without a token.
    """
    if not block.calls:
        return []
    with count_tokens(block.linears) as seen:
        for index, (hidden, kwargs) in enumerate(block.calls):
            block.calls[index] = (output_of(block.module, hidden, kwargs), kwargs)
    outputs = [hidden for hidden, _ in block.calls]
    check_finite(f"output of block {block.index}", outputs)
    for name, count in seen.items():
        if not count:
            raise no_tokens(name)
    tokens |= seen
    return outputs


def _linears_of(module: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """Full name -> Linear of a block, the widest first."""
    children = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    children.sort(key=lambda child: -child[1].in_features)
    return {f"{prefix}.{name}": linear for name, linear in children}


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


@torch.no_grad()
def walk(
    checkpoint: Checkpoint,
    samples: list[Tensor] | None,
    collector: Collector | None,
    device: torch.device = CPU,
    known: Collection[int] = (),
    tokens: dict[str, int] | None = None,
) -> Iterator[Block]:
    """Yield every block after its inputs were collected; change its weights before resuming.

    :param samples: token ids, each int64 ``[length]``; lengths may differ, nothing is padded.
        None: nothing is computed, the blocks are read alone.
    :param device: where blocks and activations are.
    :param collector: called with ``(name, inputs float32 [1, length, in])`` for every Linear and
        sample.
    :param known: numbers of blocks whose inputs nobody will take.
    :param tokens: filled with the calibration tokens that each Linear saw.
    :raises UserError: naming the file and the tensor that is missing or has NaN or infinite
        weights; the block whose calibration activations are; or the Linear that saw no token.
    """
    config = transformers_config(checkpoint.config, checkpoint.where)
    model = empty_model(config, checkpoint.family.attention)
    _move_buffers(model, device)
    _check_complete(model, checkpoint)
    samples = [sample.to(device) for sample in samples or []]
    hidden, keywords = _first_inputs(model, checkpoint, samples, device)
    check_finite("inputs of block 0", hidden)
    layers = model.get_submodule(checkpoint.family.blocks)
    for index in range(checkpoint.blocks):
        prefix = f"{checkpoint.family.blocks}.{index}"
        _fill(model, checkpoint, checkpoint.block_names(index), device)
        module, calls = layers[index], list(zip(hidden, keywords[index], strict=True))
        block = Block(index, module, _linears_of(module, prefix), calls)
        if collector and index not in known:
            _collect(block, collector)
        yield block
        hidden = _advance(block, {} if tokens is None else tokens)
        module.to("meta")
