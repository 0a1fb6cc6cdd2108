"""Process the decoder blocks in order, one in memory at a time, and collect the Linears' inputs.

The inputs of a block are the outputs of the compressed blocks before it. For each block, its
weights are read from the checkpoint and its Linears' inputs go to a collector. The caller then
replaces weights, and the block runs again to compute the inputs of the next block.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from sqft_export.errors import UserError
from sqft_export.machine.device import CPU
from sqft_export.machine.processes import ALONE, Processes
from sqft_export.model.activations import CalibrationStatistics, record_largest, watch_activations
from sqft_export.model.architecture import transformers_config
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.coverage import (
    MIN_TOKENS,
    check_finite,
    check_sum,
    count_tokens,
    no_tokens_error,
)
from sqft_export.model.empty import empty_model
from sqft_export.model.experts import find_experts, recorded
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
    processes: processes that the samples are split over. Each of them gets all norms, which are
        sums over samples in their order. A Hessian is summed in one process, which gets the inputs
        of all samples in their order. So every statistic has the bits of a single process.
    """

    def __init__(self, needs: str, damping: float = 0.01, processes: Processes = ALONE):
        self.needs, self.damping, self.processes = needs, damping, processes
        self._round: list[tuple[str, Tensor]] = []  # inputs of the current sample
        self._norms: dict[str, list[Tensor]] = {}  # squares of every sample of this process
        self._process: dict[str, int] = {}  # Linear with a sum -> its process
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
        if self.processes.count == 1:
            self._sum(name, self._squares(x))
        elif self.needs == "norms":
            self._norms.setdefault(name, []).append(self._squares(x))
        else:
            self._round.append((name, x))

    def _squares(self, x: Tensor) -> Tensor:
        """Return the contribution of a sample: its squares ``[in]``, or the inputs of a Hessian."""
        return x.square().sum(dim=0) if self.needs == "norms" else x

    def _sum(self, name: str, part: Tensor) -> None:
        """Add the contribution of one sample to a sum."""
        if name not in self._sums:
            channels = part.shape[-1]
            self._sums[name] = part.new_zeros((channels,) * (1 if self.needs == "norms" else 2))
        if self.needs == "norms":
            self._sums[name] += part
        else:
            self._sums[name].addmm_(part.T, part)

    def exchange(self, done: bool) -> None:
        """Add one sample of every process to the sums; all processes call it equally often.

        :param done: the last sample of the block was added.
        """
        if self.processes.count > 1 and self.has_hessian:
            self._exchange_inputs()
        elif self.processes.count > 1 and done and self.collector:
            found = self.processes.gather(self._norms)
            for name in found[0]:
                for part in _interleave([one[name] for one in found]):
                    self._sum(name, part)
            self._norms = {}

    def _exchange_inputs(self) -> None:
        """Send the inputs of the current samples to the processes that sum them."""
        widths = self.processes.gather({name: x.shape[1] for name, x in self._round})[0]
        if not widths.keys() <= self._process.keys():
            self._process = self.processes.assign(
                {name: width**2 for name, width in widths.items()}
            )
        found = dict(self._round)
        for name in widths:
            for part in self.processes.gather_at(found.get(name), self._process[name]):
                if part is not None:
                    self._sum(name, part)
        self._round = []

    def owned(self, block: "Block") -> list[str]:
        """Return the Linears of a block that this process compresses."""
        linears = block.linears
        if self.has_hessian and self._process:
            chosen = {name: self._process[self._owner[name]] for name in linears}
        else:
            chosen = self.processes.assign(
                {name: li.weight.numel() for name, li in linears.items()}
            )
        return [name for name in linears if chosen[name] == self.processes.number]

    def has_too_few(self, block: "Block") -> bool:
        """Return whether a method needs data and an expert saw fewer than MIN_TOKENS tokens."""
        count = block.routed_tokens
        return self.collector is not None and count is not None and count < MIN_TOKENS

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
        for gathered in (self._owner, self._sums, self._ready, self._process):
            gathered.clear()


def _interleave(parts: list[list[Tensor]]) -> Iterator[Tensor]:
    """Yield the first item of every part, then the second ones, and so on."""
    for index in range(max(map(len, parts))):
        yield from (part[index] for part in parts if index < len(part))


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
    names: all tensors of the checkpoint that belong to the module.
    routed_tokens: calibration tokens that were routed here, if the module is an expert of a block;
        None for a block. Its calls are hidden states ``[tokens, hidden]``.
    """

    index: int
    module: nn.Module
    linears: dict[str, nn.Linear]
    calls: list[Call]
    names: list[str] = field(default_factory=list)
    routed_tokens: int | None = None


@dataclass
class Position:
    """Where a walk starts, and what happens after each of its blocks.

    start: number of the first block that it yields.
    inputs: hidden states into that block, ``[1, length, hidden]`` per sample; not read at block 0.
    finish: called with the number of finished blocks and the inputs of the next one. It is not
        called if blocks share a state other than the hidden states, such as a cache.
    """

    start: int = 0
    inputs: list[Tensor] = field(default_factory=list)
    finish: Callable[[int, list[Tensor]], None] = lambda _finished, _inputs: None

    def take_inputs(self, device: torch.device) -> list[Tensor]:
        """Return the inputs and drop them here, so that they can be freed."""
        taken, self.inputs = [one.to(device) for one in self.inputs], []
        return taken


class _StopForwardError(Exception):
    """Raised by the last recorder to end the forward pass: all calls are recorded."""


class _CallRecorder(nn.Module):
    """Replace a block and record the arguments of its calls.

    :param wraps: whether the block returns its hidden states in a tuple; None: recording ends the
        forward pass.
    """

    def __init__(self, block: nn.Module, wraps: bool | None):
        super().__init__()
        # Models also read attributes of their blocks, such as the kind of attention mask.
        self.__dict__ |= {k: v for k, v in vars(block).items() if not k.startswith("_")}
        self.names = list(inspect.signature(block.forward).parameters)
        self.wraps = wraps
        self.calls: list[Call] = []

    def forward(self, hidden: Tensor, *others: object, **kwargs: object) -> Tensor | tuple[Tensor]:
        named = zip(self.names[1:], others, strict=False)
        self.calls.append((hidden, {**dict(named), **kwargs}))
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
        _check_weight(checkpoint, name, tensor)
        set_module_tensor_to_device(model, name, device, tensor, dtype=torch.float32)


def _check_weight(checkpoint: Checkpoint, name: str, weight: Tensor) -> None:
    if not torch.isfinite(weight).all():
        file = checkpoint.folder / checkpoint.headers[name].file
        raise UserError(f"{file}: {name}: has NaN or infinite weights")


def _load_rows(
    model: nn.Module, checkpoint: Checkpoint, samples: list[Tensor], device: torch.device
) -> None:
    """Load the rows of the samples' tokens from every table, which is larger than the decoder.

    :raises UserError: naming the file and tensor, if a row is NaN or infinite.
    """
    ids = torch.cat(samples).unique()
    for name in checkpoint.family.tables:
        if f"{name}.weight" not in checkpoint.headers:
            continue
        rows = checkpoint.tensor(f"{name}.weight")[ids.cpu()].to(device, torch.float32)
        _check_weight(checkpoint, f"{name}.weight", rows)
        table = model.get_submodule(name)
        table.padding_idx = None  # type: ignore[assignment]
        table.weight = nn.Parameter(rows, requires_grad=False)
        table.register_forward_pre_hook(lambda _, inputs: (torch.searchsorted(ids, inputs[0]),))


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
    left_out = (f"{family.head}.", *(f"{table}." for table in family.tables))
    before = [name for name in checkpoint.outer_names() if not name.startswith(left_out)]
    _load_weights(model, checkpoint, before, device)
    _load_rows(model, checkpoint, samples, device)
    # Run a block once to see whether it returns a tuple.
    [[(hidden, kwargs)]] = _record_calls(model, layers, samples[:1], [None])
    _load_weights(model, checkpoint, _outer_names(layers[0], checkpoint, 0), device)
    with recorded(find_experts(layers[0])):
        wraps = isinstance(layers[0](hidden, **kwargs), tuple)
    calls = _record_calls(model, layers, samples, [wraps] * (len(layers) - 1) + [None])
    modules = dict(model.named_modules())
    for name in (*(name.rpartition(".")[0] for name in before), *family.tables):
        if name in modules:
            modules[name].to("meta")
    return [hidden for hidden, _ in calls[0]], [[kwargs for _, kwargs in c] for c in calls]


def _share_no_state(values: Iterable[object]) -> bool:
    """Return whether keyword arguments hold only values that a block can't change for the next."""
    return all(
        _share_no_state(value)
        if isinstance(value, tuple)
        else value is None or isinstance(value, Tensor | bool | int | float | str)
        for value in values
    )


Exchange = Callable[[bool], None]  # called after every sample; True after the last one


def _collect(
    block: Block, collector: Collector, samples: int, exchange: Exchange = lambda _done: None
) -> None:
    """Run the block on its inputs and pass the inputs of each Linear to the collector.

    :param samples: how often ``exchange`` is called; other processes may have one sample more.
    """

    def hook_of(name: str):
        return lambda _module, args: collector(name, args[0])

    hooks = [
        linear.register_forward_pre_hook(hook_of(name)) for name, linear in block.linears.items()
    ]
    with recorded(find_experts(block.module)):
        for number in range(samples):
            for hidden, kwargs in block.calls[number : number + 1]:
                block.module(hidden, **kwargs)
            exchange(number == samples - 1)
    for hook in hooks:
        hook.remove()


def output_of(module: nn.Module, hidden: Tensor, kwargs: Keywords) -> Tensor:
    """Run a block and return its hidden states; some blocks return them in a tuple."""
    output = module(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _run_block(
    block: Block, seen: CalibrationStatistics, processes: Processes = ALONE
) -> list[Tensor]:
    """Run the block on all samples and return its outputs; they replace its inputs to free memory.

    :param seen: receives the statistics of the block and its Linears; unchanged without samples.
    :raises UserError: naming the block if its output is not finite, or a Linear without tokens.
    """
    if not block.calls:
        return []
    found = CalibrationStatistics()
    with count_tokens(block.linears) as counts, watch_activations(block.linears, found.largest):
        for index, (hidden, kwargs) in enumerate(block.calls):
            block.calls[index] = (output_of(block.module, hidden, kwargs), kwargs)
    outputs = [hidden for hidden, _ in block.calls]
    where = f"output of block {block.index}"
    check_finite(where, outputs)
    record_largest(found.largest, where, max(float(one.abs().max()) for one in outputs))
    tokens = dict.fromkeys(counts, 0)
    for others, largest in processes.gather((counts, found.largest)):
        tokens |= {name: tokens[name] + count for name, count in others.items()}
        for name, value in largest.items():
            record_largest(seen.largest, name, value)
    for name, count in tokens.items():
        if not count:
            raise no_tokens_error(name)
    seen.tokens |= tokens
    return outputs


def _linears_of(
    checkpoint: Checkpoint, module: nn.Module, index: int, names: Collection[str]
) -> dict[str, nn.Linear]:
    """Return full name -> Linear of a block, the one with the most inputs first.

    :param names: tensors of the block; Linears without a weight among them are left out.
    """
    prefix = f"{checkpoint.family.blocks}.{index}."
    found = ((f"{prefix}{n}", m) for n, m in module.named_modules() if isinstance(m, nn.Linear))
    children = [(n, m) for n, m in found if f"{n}.weight" in names and n in checkpoint.linears]
    children.sort(key=lambda child: -child[1].in_features)
    return dict(children)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _model_without_weights(checkpoint: Checkpoint, device: torch.device) -> nn.Module:
    """Return the model on the meta device, with its buffers on ``device``."""
    config = transformers_config(checkpoint.config, checkpoint.where)
    model = empty_model(config, checkpoint.family.attention)
    _move_buffers(model, device)
    _check_complete(model, checkpoint)
    return model


@torch.no_grad()
def walk(
    checkpoint: Checkpoint,
    samples: list[Tensor] | None,
    collector: Collector | None,
    device: torch.device = CPU,
    seen: CalibrationStatistics | None = None,
    position: Position | None = None,
    processes: Processes = ALONE,
    exchange: Exchange = lambda _done: None,
) -> Iterator[Block]:
    """Yield every block after collecting its inputs; the caller may then change its weights.

    :param samples: token ids, each int64 ``[length]``, not padded. None: nothing is computed.
    :param collector: called with name and inputs (float32 ``[1, length, in]``) of every Linear.
    :param seen: receives the statistics of each Linear, after the caller has changed its weights.
    :param position: where the walk resumes; None starts at block 0 and saves nothing.
    :param processes: processes that the samples are split over; ``calls`` are those of this one.
    :param exchange: :meth:`Inputs.exchange`, if the samples are split.
    :raises UserError: naming the file and the tensor, if it is missing or has NaN or infinite
        weights; the block, if its activations are NaN or infinite; the Linear, if it saw no token.
    """
    model, position = _model_without_weights(checkpoint, device), position or Position()
    seen, rounds = seen or CalibrationStatistics(), math.ceil(len(samples or []) / processes.count)
    samples = [sample.to(device) for sample in processes.share(samples or [])]
    hidden, keywords = _first_inputs(model, checkpoint, samples, device)
    hidden = position.take_inputs(device) if position.start else hidden
    check_finite(f"inputs of block {position.start}", hidden)
    separate = all(_share_no_state(call.values()) for calls in keywords for call in calls)
    for index in range(position.start, checkpoint.blocks):
        calls = list(zip(hidden, keywords[index], strict=True))
        block = _load_block(model, checkpoint, index, calls, device)
        if collector:
            _collect(block, collector, rounds, exchange)
        yield block
        if find_experts(block.module):
            yield from _walk_experts(model, checkpoint, block, collector, seen)
        hidden = _run_block(block, seen, processes)
        block.module.to("meta")
        if separate:
            position.finish(index + 1, hidden)


def _load_block(
    model: nn.Module, checkpoint: Checkpoint, index: int, calls: list[Call], device: torch.device
) -> Block:
    """Load a block, without its experts."""
    module = model.get_submodule(f"{checkpoint.family.blocks}.{index}")
    names = _outer_names(module, checkpoint, index)
    _load_weights(model, checkpoint, names, device)
    return Block(index, module, _linears_of(checkpoint, module, index, names), calls, names)


def _outer_names(module: nn.Module, checkpoint: Checkpoint, index: int) -> list[str]:
    """Return the names of a block's tensors that are not its experts'."""
    names, routed = checkpoint.block_names(index), find_experts(module) is not None
    return [name for name in names if not (routed and ".experts." in name)]


def count_parts(checkpoint: Checkpoint) -> int:
    """Return how many blocks and experts :func:`walk` yields."""
    experts = {name.rpartition(".")[0] for name in checkpoint.linears if ".experts." in name}
    return checkpoint.blocks + len(experts)


def _walk_experts(
    model: nn.Module,
    checkpoint: Checkpoint,
    block: Block,
    collector: Collector | None,
    seen: CalibrationStatistics,
) -> Iterator[Block]:
    """Yield every expert of a block with its tokens; then the block replays their outputs.

    One expert is in memory at a time, so that memory does not grow with their number.
    """
    experts, device = find_experts(block.module), next(block.module.parameters()).device
    assert experts is not None
    with recorded(experts) as routed:
        for hidden, kwargs in block.calls:
            block.module(hidden, **kwargs)
    path = next(n for n, m in block.module.named_modules() if m is experts)
    totals = [torch.zeros_like(one.x) for one in routed]
    for number, module in enumerate(experts):
        prefix = f"{checkpoint.family.blocks}.{block.index}.{path}.{number}."
        names = [n for n in checkpoint.block_names(block.index) if n.startswith(prefix)]
        _load_weights(model, checkpoint, names, device)
        inputs = [one.inputs_of(number) for one in routed]
        calls: list[Call] = [(x, {}) for x in inputs if len(x)]
        linears = _linears_of(checkpoint, block.module, block.index, names)
        count = sum(len(x) for x in inputs)
        expert = Block(block.index, module, linears, calls, names, count)
        if collector and count >= MIN_TOKENS:
            _collect(expert, collector, len(calls))
        yield expert
        seen.tokens |= dict.fromkeys(linears, count) if routed else {}
        with watch_activations(linears, seen.largest):
            for total, one in zip(totals, routed, strict=True):
                one.add_outputs(total, module, number)
        module.to("meta")
    experts.replay(totals)
