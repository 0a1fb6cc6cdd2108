"""Process the decoder blocks in order, one in memory at a time, and collect the Linears' inputs.

The inputs of a block are the outputs of the compressed blocks before it. For each block, its
weights are read from the checkpoint and its Linears' inputs go to a collector. The caller then
replaces weights, and the block runs again to compute the inputs of the next block.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from sqft_export.errors import UserError
from sqft_export.machine.device import CPU
from sqft_export.model.activations import (
    CalibrationStatistics,
    record_largest,
    watch_activations,
)
from sqft_export.model.architecture import empty_model, transformers_config
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.coverage import check_finite, check_sum, count_tokens, no_tokens_error
from sqft_export.numerics.hessian import inverse_factor

Collector = Callable[[str, Tensor], None]  # full module name, float32 inputs [..., in]


class Inputs:
    """Accumulate statistics of the calibration inputs of a block's Linears.

    Linears with the same input tensor (q, k and v; gate and up) share one sum.

    needs: the statistic that a method needs. "nothing"; "block" (only the block itself); "norms"
        (float32 ``[in]``, the L2 norm of every input channel); "hessian" (float32 ``[in, in]``,
        ``X^T X`` over all tokens); "factor" (the Hessian's
        :func:`~sqft_export.numerics.hessian.inverse_factor`).
    damping: damping of the factor.
    """

    def __init__(self, needs: str, damping: float = 0.01):
        self.needs, self.damping = needs, damping
        self._last: tuple[str, Tensor] | None = None
        self._owner: dict[str, str] = {}  # Linear -> the first Linear with the same sum
        self._sums: dict[str, Tensor] = {}
        self._ready: set[str] = set()  # owners whose sum is already converted

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
        """Return the statistic of one Linear and drop it; None if the method needs none.

        :raises UserError: naming the Linear, if it saw no token, or its inputs are NaN, infinite or
            all zero.
        """
        if self.collector is None:
            return None
        if name not in self._owner:
            raise no_tokens_error(name)
        if self._last is not None:  # first call for this block
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
        """Check every sum once, in the order of the calls, to name the first fault."""
        self._last = None
        for owner, total in self._sums.items():
            check_sum(owner, total.diagonal() if total.dim() == 2 else total)

    def _finish(self, name: str, total: Tensor) -> None:
        """Convert a sum in place to the requested statistic."""
        if self.needs == "norms":
            total.sqrt_()
        elif self.needs == "factor":
            try:
                inverse_factor(total, self.damping)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from error

    def forget(self) -> None:
        """Drop all statistics that were not taken."""
        self._last = None
        for gathered in (self._owner, self._sums, self._ready):
            gathered.clear()


Keywords = dict[str, object]  # keyword arguments of a block's forward
Call = tuple[Tensor, Keywords]  # hidden states [1, length, hidden] and keyword arguments


@dataclass
class Block:
    """A decoder block in memory.

    index: number of the block.
    linears: full name -> Linear, the one with the most inputs first, so that a method which takes
        statistics one by one frees the largest sum first.
    calls: inputs of the block, one entry per sample: hidden states ``[1, length, hidden]`` and
        keyword arguments.
    """

    index: int
    module: nn.Module
    linears: dict[str, nn.Linear]
    calls: list[Call]


class _StopForwardError(Exception):
    """Raised by the last recorder to end the forward pass: all calls are recorded."""


class _CallRecorder(nn.Module):
    """Replace a block and record the arguments of its calls.

    :param wraps: whether the block returns its hidden states in a tuple; None ends the pass here.
    """

    def __init__(self, block: nn.Module, wraps: bool | None):
        super().__init__()
        # Models also read attributes of their blocks, such as the kind of attention mask.
        self.__dict__ |= {k: v for k, v in vars(block).items() if not k.startswith("_")}
        self.wraps = wraps
        self.calls: list[Call] = []

    def forward(self, hidden: Tensor, **kwargs: object) -> Tensor | tuple[Tensor]:
        self.calls.append((hidden, kwargs))
        if self.wraps is None:
            raise _StopForwardError
        return (hidden,) if self.wraps else hidden


def _check_complete(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Check that every decoder weight is stored under its own name, as masks and grids need.

    Embedding and head may share one tensor, since they are not changed here.

    :raises UserError: naming the first missing weight.
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
            "weight that is missing or tied to another block's can't be compressed"
        )


def _load_weights(
    model: nn.Module, checkpoint: Checkpoint, names: list[str], device: torch.device
) -> None:
    """Load tensors into the model as float32.

    :raises UserError: naming the file and tensor, if a weight is NaN or infinite.
    """
    known = (
        model.state_dict().keys()
    )  # old checkpoints store buffers that transformers now computes
    for name, tensor in checkpoint.tensors([name for name in names if name in known]):
        if not torch.isfinite(tensor).all():
            file = checkpoint.folder / checkpoint.headers[name].file
            raise UserError(f"{file}: {name}: has NaN or infinite weights")
        set_module_tensor_to_device(model, name, device, tensor, dtype=torch.float32)


def _record_calls(
    model: nn.Module, layers: nn.ModuleList, samples: list[Tensor], wraps: list[bool | None]
) -> list[list[Call]]:
    """Record the arguments of the first blocks: per block, hidden states and keywords per sample.

    :param wraps: per recorded block, as for :class:`_CallRecorder`.
    """
    blocks = list(layers[: len(wraps)])
    catchers = [_CallRecorder(block, one) for block, one in zip(blocks, wraps, strict=True)]
    for index, catcher in enumerate(catchers):
        layers[index] = catcher
    for sample in samples:
        with contextlib.suppress(_StopForwardError):
            model(input_ids=sample.unsqueeze(0), use_cache=False)
    for index, block in enumerate(blocks):
        layers[index] = block
    return [catcher.calls for catcher in catchers]


def _first_inputs(
    model: nn.Module, checkpoint: Checkpoint, samples: list[Tensor], device: torch.device
) -> tuple[list[Tensor], list[list[Keywords]]]:
    """Return the hidden states into block 0 and the keyword arguments of every block, per sample.

    Keyword arguments may differ between blocks: Gemma's blocks alternate between full and windowed
    attention.
    """
    family = checkpoint.family
    layers = model.get_submodule(family.blocks)
    if not samples:
        return [], [[] for _ in layers]
    before = [n for n in checkpoint.outer_names() if not n.startswith(f"{family.head}.")]
    _load_weights(model, checkpoint, before, device)
    # Run a block once to see whether it returns a tuple.
    [[(hidden, kwargs)]] = _record_calls(model, layers, samples[:1], [None])
    _load_weights(model, checkpoint, checkpoint.block_names(0), device)
    wraps = isinstance(layers[0](hidden, **kwargs), tuple)
    calls = _record_calls(model, layers, samples, [wraps] * (len(layers) - 1) + [None])
    for module in (model.get_submodule(name.rpartition(".")[0]) for name in before):
        module.to("meta")
    return [hidden for hidden, _ in calls[0]], [[kwargs for _, kwargs in c] for c in calls]


def _collect(block: Block, collector: Collector) -> None:
    """Run the block on its inputs and pass the inputs of each Linear to the collector."""

    def hook_of(name: str):
        return lambda _module, args: collector(name, args[0])

    hooks = [
        linear.register_forward_pre_hook(hook_of(name)) for name, linear in block.linears.items()
    ]
    for hidden, kwargs in block.calls:
        block.module(hidden, **kwargs)
    for hook in hooks:
        hook.remove()


def output_of(module: nn.Module, hidden: Tensor, kwargs: Keywords) -> Tensor:
    """Run a block and return its hidden states; some blocks return them in a tuple."""
    output = module(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _run_block(block: Block, statistics: CalibrationStatistics) -> list[Tensor]:
    """Run the block on all samples and return its outputs; they replace its inputs to free memory.

    :param statistics: receives those of the block; unchanged without samples.
    :raises UserError: naming the block if its output is not finite, or a Linear without tokens.
    """
    if not block.calls:
        return []
    largest = statistics.largest
    with count_tokens(block.linears) as seen, watch_activations(block.linears, largest):
        for index, (hidden, kwargs) in enumerate(block.calls):
            block.calls[index] = (output_of(block.module, hidden, kwargs), kwargs)
    outputs = [hidden for hidden, _ in block.calls]
    where = f"output of block {block.index}"
    check_finite(where, outputs)
    record_largest(largest, where, max(float(one.abs().max()) for one in outputs))
    for name, count in seen.items():
        if not count:
            raise no_tokens_error(name)
    statistics.tokens |= seen
    return outputs


def _linears_of(module: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """Return full name -> Linear of a block, the one with the most inputs first."""
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
    statistics: CalibrationStatistics | None = None,
) -> Iterator[Block]:
    """Yield every block after collecting its inputs; the caller may then change its weights.

    :param samples: token ids, each int64 ``[length]``; lengths may differ, nothing is padded.
        None: blocks are read and nothing is computed.
    :param collector: called with ``(name, inputs float32 [1, length, in])`` for every Linear and
        sample.
    :param device: device of blocks and activations.
    :param known: numbers of the blocks whose inputs are not collected.
    :param statistics: receives tokens and largest activations.
    :raises UserError: naming the file and the tensor, if it is missing or has NaN or infinite
        weights; the block, if its activations are NaN or infinite; the Linear, if it saw no token.
    """
    statistics = statistics or CalibrationStatistics()
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
        _load_weights(model, checkpoint, checkpoint.block_names(index), device)
        module, calls = layers[index], list(zip(hidden, keywords[index], strict=True))
        block = Block(index, module, _linears_of(module, prefix), calls)
        if collector and index not in known:
            _collect(block, collector)
        yield block
        hidden = _run_block(block, statistics)
        module.to("meta")
