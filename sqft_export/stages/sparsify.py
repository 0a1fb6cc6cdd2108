"""sparsify: prune the decoder Linears; write the checkpoint and the pruning masks."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sqft_export.data.calibration import calibration_fields, calibration_tensors
from sqft_export.data.items import TASK_FILES
from sqft_export.machine.device import device_name, device_of
from sqft_export.machine.launcher import process_rank
from sqft_export.machine.processes import Processes, join_processes
from sqft_export.machine.progress import start_at
from sqft_export.metrics import SparsifyMetrics
from sqft_export.model.activations import CalibrationStatistics
from sqft_export.model.block_state import BlockStates, delete_files
from sqft_export.model.blocks import Block, Inputs, count_parts, walk
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.companions import copy_companions, float_config
from sqft_export.model.coverage import expert_warnings
from sqft_export.model.storage import (
    MAX_BUFFER_BYTES,
    finite_dtype,
    mask_writer,
    plain_names,
    quantized_names,
    read_quantized,
)
from sqft_export.numerics.affine import dequantize
from sqft_export.numerics.masks import mask_to_bits
from sqft_export.recipe.schema import Recipe, Sparsify
from sqft_export.recipe.sections import CalibrationSections, DeviceSection, SparsifySection
from sqft_export.recipe.view import section_fields
from sqft_export.sparsifiers import Pruning, Sparsifier, override_for, pruning_of, sparsifier
from sqft_export.sparsifiers.allocation import Curve, allocate, error_curve
from sqft_export.stages import Context

CONSUMES: tuple[str, ...] = ()
READS: tuple[str, ...] = ("model", "calibration", "device")
SETTINGS = section_fields("sparsify", Sparsify, without=("reconstruct",))
FREE: tuple[str, ...] = ("device", *TASK_FILES)
VERSION = 5
RESUMES = True  # at the first block that is not finished
DISTRIBUTED = True
ALLOCATION = "allocation"  # states of the walk that measures error curves


class Sections(CalibrationSections, SparsifySection, DeviceSection, Protocol):
    """The recipe sections that this pass reads."""


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return the settings, and the calibration fields if the method calibrates."""
    return (*SETTINGS, *(calibration_fields(recipe) if recipe.sparsify.calibrates else ()))


@dataclass
class _Results:
    """Results of the finished blocks.

    parts: number of finished blocks and experts. dropped, sizes: Linear -> pruned weights, and all
    weights. uncalibrated: Linears that were pruned by magnitude, because they saw too few tokens.
    """

    parts: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    uncalibrated: list[str] = field(default_factory=list)
    seen: CalibrationStatistics = field(default_factory=CalibrationStatistics)

    def count(self, name: str, mask: Tensor) -> None:
        """Count the weights that a mask drops: bool ``[out, in]``, True = kept."""
        self.dropped[name] = int((~mask).sum())
        self.sizes[name] = mask.numel()

    def sparsity(self) -> dict[str, float]:
        """Return the share of pruned weights per Linear, and over all Linears (``all``)."""
        shares = {name: self.dropped[name] / self.sizes[name] for name in self.sizes}
        return shares | {"all": sum(self.dropped.values()) / sum(self.sizes.values())}


@dataclass
class _Curves:
    """Error curves of the Linears of the finished blocks; parts, seen as in :class:`_Results`."""

    parts: int = 0
    curves: dict[str, Curve] = field(default_factory=dict)
    seen: CalibrationStatistics = field(default_factory=CalibrationStatistics)


def run(context: Context[Sections]) -> SparsifyMetrics:
    """Write ``model/`` and ``masks.safetensors``."""
    config, checkpoint = context.recipe.sparsify, Checkpoint(context.model)
    existing = bool(checkpoint.quantized_linears)
    splits = config.calibrates and checkpoint.family.experts is None and not existing
    if process_rank() and not splits:
        return SparsifyMetrics(sparsity={})  # the first process does it all
    if existing:
        return _mask_existing_zeros(context, checkpoint)
    with join_processes(context.folder.name.partition(".")[0], splits) as processes:
        return _prune(context, checkpoint, processes)


def _prune(
    context: Context[Sections], checkpoint: Checkpoint, processes: Processes
) -> SparsifyMetrics:
    """Prune all blocks and write the results."""
    config, samples = context.recipe.sparsify, None
    if config.calibrates:
        samples = calibration_tensors(context.recipe, context.model)
    prunings, seen = _prunings(context, checkpoint, samples, processes)
    inputs = Inputs(sparsifier(config.method).NEEDS, processes=processes)
    if inputs.collector is None:
        samples = None  # only the allocation needed them
    model, first = context.folder / "model", processes.is_first
    model_writer = checkpoint.writer(model, MAX_BUFFER_BYTES, active=first)
    with model_writer as writer, mask_writer(context.folder, first) as masks:
        writers = {"model": writer, "masks": masks}
        states = BlockStates(
            context.folder, writers, _Results, processes=processes, keep=(ALLOCATION,)
        )
        results = states.results
        results.seen = results.seen if states.finished else seen
        if first:
            copy_companions(context.model, model, checkpoint.config)
        _prune_blocks(context, checkpoint, samples, inputs, prunings, states)
        writer.add_all(checkpoint.tensors(checkpoint.outer_names()))
    return SparsifyMetrics(
        sparsity=results.sparsity(),
        device=device_name(device_of(context.recipe.device)),
        **results.seen.metrics(),
        uncalibrated_experts=results.uncalibrated,
        warnings=[
            *results.seen.warnings(checkpoint.linears, inputs.has_hessian),
            *expert_warnings(results.uncalibrated, results.seen.tokens, "pruned by magnitude"),
        ],
    )


def _prune_blocks(
    context: Context[Sections],
    checkpoint: Checkpoint,
    samples: list[Tensor] | None,
    inputs: Inputs,
    prunings: dict[str, Pruning | None],
    states: BlockStates[_Results],
) -> None:
    """Prune and write the blocks that are not finished."""
    method, results = sparsifier(context.recipe.sparsify.method), states.results
    device = device_of(context.recipe.device)
    sharing = (results.seen, states.position(), inputs.processes, inputs.exchange)
    advance = start_at(context.start, count_parts(checkpoint), results.parts)
    for block in walk(checkpoint, samples, inputs.collector, device, *sharing):
        if starved := inputs.has_too_few(block):
            results.uncalibrated += block.linears
        used = sparsifier("magnitude") if starved else method
        found = None if starved else inputs
        for name, tensor in _prune_block(checkpoint, block, used, prunings, found, states):
            states.writers["model"].add(name, tensor)
        results.parts += 1
        advance()


def _prune_block(
    checkpoint: Checkpoint,
    block: Block,
    method: Sparsifier,
    prunings: dict[str, Pruning | None],
    inputs: Inputs | None,
    states: BlockStates[_Results],
) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a block with its pruned Linears first; write their masks.

    :param inputs: statistics of the Linears' inputs; None if the method needs none.
    """
    rest = set(block.names)
    for name, weight, mask in _pruned_linears(block, method, prunings, inputs):
        linear = block.linears[name]
        states.writers["masks"].add(name, mask_to_bits(mask).cpu())
        states.results.count(name, mask)
        linear.weight.copy_(weight)
        key = f"{name}.weight"
        yield key, weight.to(checkpoint.dtype(key)).cpu()
        rest.remove(key)
    yield from checkpoint.tensors(sorted(rest))


def _pruned_linears(
    block: Block, method: Sparsifier, prunings: dict[str, Pruning | None], inputs: Inputs | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, pruned weight and mask of every Linear; several processes share the work."""

    def compress(name: str) -> tuple[Tensor, Tensor]:
        statistic = inputs.take(name) if inputs else None
        return _compress(method, block.linears[name].weight, prunings[name], statistic)

    if inputs is None or inputs.processes.count == 1:
        yield from ((name, *compress(name)) for name in block.linears)
        return
    parts = inputs.processes.gather({name: compress(name) for name in inputs.owned(block)})
    inputs.forget()
    found = {name: result for part in parts for name, result in part.items()}
    yield from ((name, *found[name]) for name in block.linears)


def _prunings(
    context: Context[Sections],
    checkpoint: Checkpoint,
    samples: list[Tensor] | None,
    processes: Processes,
) -> tuple[dict[str, Pruning | None], CalibrationStatistics]:
    """Return the pruning of every Linear, None leaves it dense; and the statistics of a walk.

    It follows the recipe. An allocation distributes the overall sparsity by the output error that
    it costs in each Linear.
    """
    config = context.recipe.sparsify
    prunings = {name: pruning_of(config, name) for name in checkpoint.linears}
    if not config.allocated:
        return prunings, CalibrationStatistics()
    assert config.sparsity is not None and samples is not None
    states = BlockStates(context.folder, {}, _Curves, processes=processes, name=ALLOCATION)
    results, inputs = states.results, Inputs("norms", processes=processes)
    device = device_of(context.recipe.device)
    advance = start_at(context.start, count_parts(checkpoint), results.parts)
    sharing = (results.seen, states.position(), processes, inputs.exchange)
    for block in walk(checkpoint, samples, inputs.collector, device, *sharing):
        for name, linear in block.linears.items():
            few = inputs.has_too_few(block)
            norms = torch.ones_like(linear.weight[0]) if few else inputs.take(name)
            if override_for(config, name) is None:
                results.curves[name] = error_curve(linear.weight, norms, config.sparsity)
        results.parts += 1
        advance()
    shares = allocate(results.curves, config.sparsity)
    allocated = {name: Pruning(share, None, config.at_most) for name, share in shares.items()}
    return prunings | allocated, results.seen


def _mask_existing_zeros(context: Context[Sections], checkpoint: Checkpoint) -> SparsifyMetrics:
    """Write a quantized checkpoint as floats, and the mask of weights that are not zero.

    A weight is zero if its code is the zero point. One tensor is in memory at a time. Tensors that
    the checkpoint stores as floats keep their dtype.
    """
    delete_files(context.folder)
    names, dtype = quantized_names(checkpoint), checkpoint.float_dtype
    linears, keys = set(checkpoint.quantized_linears), {f"{name}.weight" for name in names}
    advance = context.start(len(names))
    model = context.folder / "model"
    config = float_config(checkpoint.config, str(dtype).removeprefix("torch."))
    copy_companions(checkpoint.folder, model, config)
    results, model_writer = _Results(), checkpoint.writer(model, MAX_BUFFER_BYTES)
    with model_writer as writer, mask_writer(context.folder) as masks:
        for key, tensor in checkpoint.tensors(n for n in plain_names(checkpoint) if n not in keys):
            writer.add(key, tensor)
        for name in names:
            weight = dequantize(*read_quantized(checkpoint, name))
            if name in linears:
                masks.add(name, mask_to_bits(weight != 0))
                results.count(name, weight != 0)
            writer.add(f"{name}.weight", weight.to(finite_dtype(weight, dtype)))
            advance()
    return SparsifyMetrics(sparsity=results.sparsity())


def _compress(
    method: Sparsifier, weight: Tensor, pruning: Pruning | None, inputs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the pruned weight and the mask of one Linear; without a pruning it stays dense."""
    if pruning is None:
        return weight, torch.ones_like(weight, dtype=torch.bool)
    return method.compress(weight, pruning, inputs)
