"""quantize: fit a grid to every decoder Linear and compensate its weights for the rounding."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from sqft_export.data.calibration import calibration_fields, calibration_tensors
from sqft_export.data.items import TASK_FILES
from sqft_export.machine.device import device_name, device_of
from sqft_export.machine.launcher import process_rank
from sqft_export.machine.processes import Processes, join_processes
from sqft_export.machine.progress import start_at
from sqft_export.metrics import QuantizeMetrics
from sqft_export.model.activations import CalibrationStatistics, scale_warnings
from sqft_export.model.block_state import BlockStates, delete_files
from sqft_export.model.blocks import Block, Inputs, count_parts, walk
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.companions import copy_companions, float_config
from sqft_export.model.coverage import expert_warnings
from sqft_export.model.reconstruction import Reconstructed, reconstruct
from sqft_export.model.storage import (
    MAX_BUFFER_BYTES,
    GridWriter,
    finite_dtype,
    load_weight_mask,
    outer_grid,
    plain_names,
    quantized_names,
    read_quantized,
)
from sqft_export.model.tensorfiles import TensorWriter
from sqft_export.numerics.affine import (
    ROWS_AT_ONCE,
    SMALLEST_SCALE,
    Grid,
    dequantize,
    fake_quantize,
    quantize,
    split_groups,
)
from sqft_export.numerics.groups import fallback_group_size
from sqft_export.quantizers import BlockQuantizer, Quantizer, quantizer
from sqft_export.recipe.schema import Quantize, Recipe
from sqft_export.recipe.sections import CalibrationSections, DeviceSection, QuantizeSection
from sqft_export.recipe.view import section_fields
from sqft_export.stages import Context

CONSUMES: tuple[str, ...] = ("sparsify", "reconstruct")
READS: tuple[str, ...] = ("model", "calibration", "device")
# The fallback option only decides whether a group size is refused; it changes no result.
SETTINGS = section_fields("quantize", Quantize, without=("group_size_fallback",))
FREE: tuple[str, ...] = ("device", *TASK_FILES)
VERSION = 7
RESUMES = True  # at the first block that is not finished
DISTRIBUTED = True
MIN_CLAMPED_SHARE = 0.01  # of the groups of a Linear; a smaller share gives no warning


class Sections(CalibrationSections, QuantizeSection, DeviceSection, Protocol):
    """The recipe sections that this pass reads."""


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return the settings, and the calibration fields if the method calibrates."""
    calibrated = calibration_fields(recipe) if recipe.quantize.calibrates else ()
    return (*SETTINGS, "scale_bits", *calibrated)


def cast_keeping_codes(weight: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Cast a weight to the checkpoint's dtype without changing its codes.

    The cast can move a weight past the middle between two grid points. Such a weight is stored as
    its grid point, whose code no cast changes. Rows are processed in chunks, because the temporary
    copies need more memory than the weight.

    :param weight: ``[out, in]``.
    :param dtype: dtype of the result, ``[out, in]``.
    """
    stored = torch.empty(weight.shape, dtype=dtype)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        part, part_grid = weight[rows].float(), grid.rows(rows)
        codes, cast = quantize(part, part_grid), part.to(dtype)
        changed = quantize(cast, part_grid) != codes
        stored[rows] = torch.where(changed, dequantize(codes, part_grid).to(dtype), cast)
    return stored


def set_grid_points(linear: nn.Linear, weight: Tensor, grid: Grid) -> None:
    """Set a Linear's weight to grid points, so that later blocks get the quantized output."""
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        linear.weight[rows] = fake_quantize(weight[rows], grid.rows(rows))


def run(context: Context[Sections]) -> QuantizeMetrics:
    """Write ``model/`` (compensated floats) and ``grids.safetensors``, which gives their codes."""
    splits = _splits(context)
    if process_rank() and not splits:
        return QuantizeMetrics(device="", group_size={}, bits={})  # the first process does it all
    with join_processes(context.folder.name.partition(".")[0], splits) as processes:
        return _run(context, processes)


def _splits(context: Context[Sections]) -> bool:
    """Return whether several processes split the samples: those of a method that sums inputs."""
    config, base = context.recipe.quantize, Checkpoint(context.latest_model())
    calibrates = config.calibrates and config.method != "nncf" and not config.reconstruct
    return calibrates and base.family.experts is None


def _run(context: Context[Sections], processes: Processes) -> QuantizeMetrics:
    model = context.folder / "model"
    base = Checkpoint(context.model)
    weight_writer = base.writer(model, MAX_BUFFER_BYTES, active=processes.is_first)
    with GridWriter(context.folder, processes.is_first) as grids, weight_writer as weights:
        if context.recipe.quantize.method == "existing":
            metrics = _copy_codes(context, grids, weights)
        else:
            metrics = _compress(context, grids, weights, processes)
    return QuantizeMetrics(
        **metrics,
        device=device_name(_device(context)),
        group_size={name: group_size for name, (_, group_size) in grids.sizes.items()},
        bits={name: bits for name, (bits, _) in grids.sizes.items()},
    )


def _device(context: Context[Sections]) -> torch.device:
    """Return the device of the recipe; for NNCF the CPU, on which it traces the blocks."""
    nncf = context.recipe.quantize.method == "nncf"
    return device_of("cpu" if nncf else context.recipe.device)


def _copy_codes(context: Context[Sections], grids: GridWriter, weights: TensorWriter) -> dict:
    """Take codes and grids unchanged from a quantized checkpoint; weights are their grid points."""
    delete_files(context.folder)
    base = Checkpoint(context.model)
    names = quantized_names(base)
    advance = context.start(len(names))
    copy_companions(base.folder, weights.folder, float_config(base.config))
    keys = {f"{name}.weight" for name in names}
    for name, tensor in base.tensors(n for n in plain_names(base) if n not in keys):
        weights.add(name, tensor)
    for name in names:
        codes, grid = read_quantized(base, name)
        weight = dequantize(codes, grid)
        grids.add(name, grid)
        dtype = finite_dtype(weight, base.float_dtype)
        weights.add(f"{name}.weight", cast_keeping_codes(weight, grid, dtype))
        advance()
    return {"warnings": []}


def _clamped_scale_warning(name: str, weight: Tensor, grid: Grid) -> Iterator[str]:
    """Yield a warning if weights are too small for the smallest scale of float16."""
    largest = split_groups(weight.abs(), grid.group_size).amax(dim=2)
    clamped = (grid.scale.abs().float() <= SMALLEST_SCALE) & (largest > 0)
    if (share := float(clamped.float().mean())) > MIN_CLAMPED_SHARE:
        yield (
            f"{name}: {share:.0%} of its groups have the smallest scale of float16; their weights "
            "are too small for it and lose precision"
        )


@dataclass
class _Results:
    """Results of the finished blocks.

    parts: number of finished blocks and experts. sizes: module -> bits and group size. scales:
    module -> its largest scale. uncalibrated: Linears that were rounded without GPTQ. errors:
    relative errors of each block before and after its reconstruction.
    """

    parts: int = 0
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    uncalibrated: list[str] = field(default_factory=list)
    errors: list[tuple[float, float]] = field(default_factory=list)
    seen: CalibrationStatistics = field(default_factory=CalibrationStatistics)


@dataclass(frozen=True)
class _Output:
    """Writers of the pass, and its results so far."""

    checkpoint: Checkpoint
    weights: TensorWriter
    grids: GridWriter
    results: _Results

    def add(self, name: str, weight: Tensor, grid: Grid) -> None:
        """Write the grid of a module and its weight, float32 ``[out, in]``, with these codes."""
        self.results.warnings += _clamped_scale_warning(name, weight, grid)
        self.results.scales[name] = float(grid.scale.abs().max())
        self.grids.add(name, grid)
        key = f"{name}.weight"
        self.weights.add(key, cast_keeping_codes(weight, grid, self.checkpoint.dtype(key)))


def _compress(
    context: Context[Sections], grids: GridWriter, weights: TensorWriter, processes: Processes
) -> dict:
    """Quantize all blocks in order, then embedding and head; return the metrics."""
    config, checkpoint = context.recipe.quantize, Checkpoint(context.latest_model())
    walks = ("dense", "inputs") if config.reconstruct else ("inputs",)
    writers = {"model": weights, "grids": grids.tensors}
    states = BlockStates(context.folder, writers, _Results, walks, processes)
    results, needs = states.results, quantizer(config.method).NEEDS
    inputs, grids.sizes = Inputs(needs, config.damping, processes), results.sizes
    if processes.is_first:
        copy_companions(checkpoint.folder, weights.folder, checkpoint.config)
    output = _Output(checkpoint, weights, grids, results)
    _compress_blocks(context, inputs, states, output)
    for name, tensor in checkpoint.tensors(checkpoint.outer_names()):
        if (of_rows := outer_grid(checkpoint, name, tensor, config)) is not None:
            output.add(name.removesuffix(".weight"), tensor, of_rows)
        else:
            weights.add(name, tensor)
    seen, uncalibrated = results.seen, results.uncalibrated
    warnings = [
        *results.warnings,
        *seen.warnings(checkpoint.linears, inputs.has_hessian),
        *scale_warnings(results.scales),
        *expert_warnings(uncalibrated, seen.tokens, "rounded without GPTQ"),
    ]
    found = {"uncalibrated_experts": uncalibrated, "block_errors": results.errors}
    return {"warnings": warnings, "largest_scales": results.scales, **found, **seen.metrics()}


def _compress_blocks(
    context: Context[Sections], inputs: Inputs, states: BlockStates[_Results], output: _Output
) -> None:
    """Quantize and write the blocks that are not finished."""
    method, results = quantizer(context.recipe.quantize.method), states.results
    advance = start_at(context.start, count_parts(output.checkpoint), results.parts)
    for target, block in _walk(context, output.checkpoint, inputs, states):
        rest = set(block.names) - {f"{name}.weight" for name in block.linears}
        quantized = _quantize_block(context, method, block, inputs)
        if inputs.processes.count > 1:
            quantized = _gather_linears(block, quantized, inputs.processes)
        results.uncalibrated += block.linears if inputs.has_too_few(block) else ()
        if target:
            trained = _reconstruct(context, target, block, quantized)
            quantized = ((n, trained.weights[n], grid) for n, grid in trained.grids.items())
            results.errors.append(trained.errors)
        for name, weight, grid in quantized:
            # Written at once, so that a block's compensated weights are not kept.
            output.add(name, weight.cpu(), grid.cpu())
            set_grid_points(block.linears[name], weight, grid)
        output.weights.add_all(output.checkpoint.tensors(sorted(rest)))
        results.parts += 1
        advance()


def _gather_linears(
    block: Block, quantized: Iterator[tuple[str, Tensor, Grid]], processes: Processes
) -> Iterator[tuple[str, Tensor, Grid]]:
    """Yield the Linears of a block that all processes have quantized, in the block's order."""
    parts = processes.gather({name: (weight.cpu(), grid.cpu()) for name, weight, grid in quantized})
    found = {name: result for part in parts for name, result in part.items()}
    device = next(block.module.parameters()).device
    for name in block.linears:
        weight, grid = found[name]
        on_device = grid.scale.to(device), grid.zero_point.to(device)
        yield name, weight.to(device), Grid(*on_device, grid.bits, grid.group_size)


def _walk(
    context: Context[Sections],
    checkpoint: Checkpoint,
    inputs: Inputs,
    states: BlockStates[_Results],
) -> Iterator[tuple[Block | None, Block]]:
    """Yield (dense block or None, block to compress) for every block that is not finished.

    The dense block is the target of the reconstruction, None without reconstruction.
    """
    device, samples = _device(context), None
    if context.recipe.quantize.calibrates:
        samples = calibration_tensors(context.recipe, context.model)
    seen, position = states.results.seen, states.position("inputs")
    sharing = (position, inputs.processes, inputs.exchange)
    blocks = walk(checkpoint, samples, inputs.collector, device, seen, *sharing)
    if not context.recipe.quantize.reconstruct:
        return ((None, block) for block in blocks)
    dense = Checkpoint(context.model)
    targets = walk(dense, samples, None, device, position=states.position("dense"))
    return zip(targets, blocks, strict=True)


def _reconstruct(
    context: Context[Sections],
    target: Block,
    block: Block,
    quantized: Iterator[tuple[str, Tensor, Grid]],
) -> Reconstructed:
    """Train a quantized block to reproduce the output of the dense block ``target``."""
    config, sparsified = context.recipe.quantize.reconstruct, context.path("sparsify")
    assert config is not None
    grids, masks = {}, {}
    for name, weight, grid in quantized:
        block.linears[name].weight.copy_(weight)
        grids[name] = grid
        masks[name] = load_weight_mask(sparsified, name, weight)
    seed, scale_bits = context.recipe.seed + block.index, context.recipe.scale_bits
    return reconstruct(target, block, masks, config, seed, grids, scale_bits)


def _quantize_block(
    context: Context[Sections], method: Quantizer | BlockQuantizer, block: Block, inputs: Inputs
) -> Iterator[tuple[str, Tensor, Grid]]:
    """Yield name, compensated weight (float32 ``[out, in]``) and grid of this process's Linears."""
    config, sparsified = context.recipe.quantize, context.path("sparsify")
    scale_bits = context.recipe.scale_bits

    def mask_of(name: str) -> Tensor:
        return load_weight_mask(sparsified, name, block.linears[name].weight)

    if method.NEEDS == "block":
        yield from cast(BlockQuantizer, method).compress_block(block, mask_of, config)
        return
    starved = inputs.has_too_few(block)
    used = cast(Quantizer, quantizer("rtn") if starved else method)
    for name in inputs.owned(block):
        linear = block.linears[name]
        group_size = fallback_group_size(linear.in_features, config.group_size)
        grid_options = config.bits, group_size, config.symmetric
        found = None if starved else inputs.take(name)
        yield (
            name,
            *used.compress(linear.weight, mask_of(name), *grid_options, found, scale_bits),
        )
