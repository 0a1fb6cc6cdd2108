"""quantize: a grid for every decoder Linear, and weights compensated for it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from sqft_export.data.calibration import calibration_fields, calibration_tensors
from sqft_export.data.items import TRAIN_FILES
from sqft_export.model.blocks import Block, Inputs, walk
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.companions import copy_companions, float_config, write_config
from sqft_export.model.coverage import coverage_warnings
from sqft_export.model.reconstruction import Reconstructed, reconstruct
from sqft_export.model.storage import (
    HELD_BYTES,
    GridWriter,
    dtype_that_holds,
    mask_for,
    plain_names,
    quantized_names,
    read_quantized,
)
from sqft_export.model.tensorfiles import TensorWriter
from sqft_export.numerics.affine import (
    SMALLEST_SCALE,
    Grid,
    dequantize,
    fake_quantize,
    fit_grid,
    grouped,
    quantize,
)
from sqft_export.numerics.groups import fallback_group_size
from sqft_export.quantizers import BlockQuantizer, Quantizer, quantizer
from sqft_export.recipe.schema import Quantize, Recipe
from sqft_export.recipe.view import section_fields
from sqft_export.run.device import device_name, device_of
from sqft_export.stages import Context

CONSUMES: tuple[str, ...] = ("sparsify", "reconstruct")
READS: tuple[str, ...] = ("model", "calibration", "device")
# What refuses a group size changes no result.
SETTINGS = section_fields("quantize", Quantize, without=("group_size_fallback",))
FREE: tuple[str, ...] = ("device", *TRAIN_FILES)
VERSION = 6
RESUMES = True  # at the block it was at, where blocks are reconstructed
DISTRIBUTED = False
BLOCKS = "blocks"
_ROWS_AT_ONCE = 1024
NOTABLE = 0.01  # of the groups of a Linear


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Calibration counts where something is calibrated."""
    calibrated = calibration_fields(recipe) if recipe.quantize.calibrates else ()
    return (*SETTINGS, "scale_bits", *calibrated)


def stored_as(weight: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The weight in the checkpoint's dtype, with the codes it has in float32.

    Casting can carry a weight over the middle between two codes; such a one is stored as its own
    grid point, which no cast moves that far. A few rows at a time: the copies that this takes
    would be more than the weight.
    """
    stored = torch.empty(weight.shape, dtype=dtype)
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        part, part_grid = weight[rows], grid.rows(rows)
        codes, cast = quantize(part, part_grid), part.to(dtype)
        moved = quantize(cast, part_grid) != codes
        stored[rows] = torch.where(moved, dequantize(codes, part_grid).to(dtype), cast)
    return stored


def round_onto(linear: nn.Linear, weight: Tensor, grid: Grid) -> None:
    """Give a Linear the grid points of a weight: what the blocks after it shall see."""
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        linear.weight[rows] = fake_quantize(weight[rows], grid.rows(rows))


def run(context: Context) -> dict:
    """Writes ``model/``, whose codes on ``grids.safetensors`` are the quantized model."""
    make = _existing_codes if context.recipe.quantize.method == "given" else _compress
    weight_writer = TensorWriter(context.folder / "model", shard_bytes=HELD_BYTES)
    with GridWriter(context.folder) as grids, weight_writer as weights:
        made = make(context, grids, weights)
    shutil.rmtree(context.folder / BLOCKS, ignore_errors=True)
    return made | {
        "device": device_name(_device(context)),
        "group_size": {name: group_size for name, (_, group_size) in grids.sizes.items()},
        "bits": {name: bits for name, (bits, _) in grids.sizes.items()},
    }


def _device(context: Context) -> torch.device:
    """NNCF takes its own way through torch, on the CPU."""
    nncf = context.recipe.quantize.method == "nncf"
    return device_of("cpu" if nncf else context.recipe.device)


def _existing_codes(context: Context, grids: GridWriter, weights: TensorWriter) -> dict:
    """Codes and grids of a GPTQ checkpoint as they are; each weight is its grid point."""
    base = Checkpoint(context.model)
    names = quantized_names(base)
    advance = context.start(len(names))
    copy_companions(base.folder, weights.folder)
    write_config(weights.folder, float_config(base.config))
    keys = {f"{name}.weight" for name in names}
    for name, tensor in base.tensors(n for n in plain_names(base) if n not in keys):
        weights.add(name, tensor)
    for name in names:
        codes, grid = read_quantized(base, name)
        weight = dequantize(codes, grid)
        grids.add(name, grid)
        dtype = dtype_that_holds(weight, base.float_dtype)
        weights.add(f"{name}.weight", stored_as(weight, grid, dtype))
        advance()
    return {"warnings": []}


def _loss(name: str, weight: Tensor, grid: Grid) -> Iterator[str]:
    """A warning, where scales can't be as small as their weights want them."""
    largest = grouped(weight.abs(), grid.group_size).amax(dim=2)
    held = (grid.scale.abs().float() <= SMALLEST_SCALE) & (largest > 0)
    if (share := float(held.float().mean())) > NOTABLE:
        yield (
            f"{name}: {share:.0%} of its groups are held at the smallest scale of float16; its "
            "weights are smaller, and lose what the codes can't tell"
        )


def _compress(context: Context, grids: GridWriter, weights: TensorWriter) -> dict:
    config, checkpoint = context.recipe.quantize, Checkpoint(context.latest_model())
    method = quantizer(config.method)
    advance = context.start(checkpoint.blocks)
    inputs = Inputs(method.NEEDS, config.damping)
    held, errors, tokens = list[str](), list[tuple[float, float]](), dict[str, int]()
    copy_companions(checkpoint.folder, weights.folder)
    write_config(weights.folder, checkpoint.config)

    def add(name: str, weight: Tensor, grid: Grid) -> None:
        held.extend(_loss(name, weight, grid))
        grids.add(name, grid)
        key = f"{name}.weight"
        weights.add(key, stored_as(weight, grid, checkpoint.dtype(key)))

    for theirs, block in _walked(context, checkpoint, inputs, tokens):
        rest = set(checkpoint.block_names(block.index))
        quantized = _quantized(context, method, block, inputs)
        if theirs:
            made = _reconstructed(context, theirs, block, quantized)
            quantized = ((name, made.weights[name], grid) for name, grid in made.grids.items())
            errors.append(made.errors)
            inputs.forget()
        for name, weight, grid in quantized:
            # At once: a block's compensated floats are not kept.
            add(name, weight.cpu(), grid.cpu())
            round_onto(block.linears[name], weight, grid)
            rest.remove(f"{name}.weight")
        for name, tensor in checkpoint.tensors(sorted(rest)):
            weights.add(name, tensor)
        advance()
    for name, tensor in checkpoint.tensors(checkpoint.outer_names()):
        if config.embedding_bits and tensor.dim() == 2:
            add(name.removesuffix(".weight"), tensor.float(), _row_grid(tensor.float(), config))
        else:
            weights.add(name, tensor)
    held += coverage_warnings(tokens, checkpoint.linears, inputs.has_hessian)
    metrics = {"warnings": held, "calibration_tokens": tokens}
    return metrics | ({"block_errors": errors} if errors else {})


def _row_grid(weight: Tensor, config: Quantize) -> Grid:
    """The grid of embedding or head: one scale per row."""
    assert config.embedding_bits
    return fit_grid(weight, config.embedding_bits, weight.shape[1], config.symmetric)


def _walked(
    context: Context, checkpoint: Checkpoint, inputs: Inputs, tokens: dict[str, int]
) -> Iterator[tuple[Block | None, Block]]:
    """Blocks to compress, and the dense ones that they shall come back to, if any.

    :param tokens: filled with the calibration tokens that each Linear saw.
    """
    device, samples = _device(context), None
    if context.recipe.quantize.calibrates:
        samples = calibration_tensors(context.recipe, context.model)
    known = [i for i in range(checkpoint.blocks) if _kept_block(context, i).is_file()]
    ours = walk(checkpoint, samples, inputs.collector, device, known, tokens)
    if not context.recipe.quantize.reconstruct:
        return ((None, block) for block in ours)
    return zip(walk(Checkpoint(context.model), samples, None, device), ours, strict=True)


def _kept_block(context: Context, index: int) -> Path:
    """What an interrupted run has made of a block that is reconstructed."""
    return context.folder / BLOCKS / f"{index}.safetensors"


def _reconstructed(
    context: Context, theirs: Block, block: Block, quantized: Iterator[tuple[str, Tensor, Grid]]
) -> Reconstructed:
    """A block as rounding left it, trained; from its file if an interrupted run had come so far."""
    config, sparsified = context.recipe.quantize.reconstruct, context.path("sparsify")
    assert config is not None
    file = _kept_block(context, block.index)
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        grids, masks = {}, {}
        for name, weight, grid in quantized:
            block.linears[name].weight.copy_(weight)
            grids[name] = grid
            masks[name] = mask_for(sparsified, name, weight)
        seed, scale_bits = context.recipe.seed + block.index, context.recipe.scale_bits
        reconstruct(theirs, block, masks, config, seed, grids, scale_bits).save(file)
    return Reconstructed.load(file)


def _quantized(
    context: Context, method: Quantizer | BlockQuantizer, block: Block, inputs: Inputs
) -> Iterator[tuple[str, Tensor, Grid]]:
    """Name, compensated weight float32 ``[out, in]`` and grid of every Linear of a block."""
    config, sparsified = context.recipe.quantize, context.path("sparsify")
    scale_bits = context.recipe.scale_bits

    def mask_of(name: str) -> Tensor:
        return mask_for(sparsified, name, block.linears[name].weight)

    if method.NEEDS == "block":
        yield from cast(BlockQuantizer, method).compress_block(block, mask_of, config)
        return
    for name, linear in block.linears.items():
        group_size = fallback_group_size(linear.in_features, config.group_size)
        grid_options = config.bits, group_size, config.symmetric
        yield (
            name,
            *cast(Quantizer, method).compress(
                linear.weight, mask_of(name), *grid_options, inputs.take(name), scale_bits
            ),
        )
