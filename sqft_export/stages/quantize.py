"""quantize: a grid for every decoder Linear, and weights compensated for it."""

import json

import torch
from torch import Tensor

from sqft_export.calibration import walk
from sqft_export.checkpoint import Checkpoint, CheckpointWriter, copy_companions
from sqft_export.compressed import load_mask, load_packed_masks, read_packed, save_grids
from sqft_export.numerics.affine import Grid, dequantize, fake_quantize, quantize
from sqft_export.numerics.groups import fallback_group_size
from sqft_export.quantizers import quantizer
from sqft_export.recipe import Recipe
from sqft_export.stages import Context
from sqft_export.stages.sparsify import calibration

CONSUMES = ("sparsify",)
READS = ("model", "calibration")
VERSION = 1


def options(recipe: Recipe) -> dict:
    return {
        "quantize": recipe.quantize.model_dump(),
        "calibration": recipe.calibration.model_dump(),
        "seed": recipe.seed,
    }


def stored_as(weight: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The weight in the checkpoint's dtype, with the codes it has in float32.

    Casting can carry a weight over the middle between two codes; such a one is stored as its own
    grid point, which no cast moves that far.
    """
    codes, cast = quantize(weight, grid), weight.to(dtype)
    moved = quantize(cast, grid) != codes
    return torch.where(moved, dequantize(codes, grid).to(dtype), cast)


def run(context: Context) -> dict:
    """Writes ``model/``, whose codes on ``grids.safetensors`` are the quantized model."""
    given = context.recipe.quantize.method == "given"
    grids = _given(context) if given else _compress(context)
    save_grids(context.folder, grids)
    return {"group_size": {name: grid.group_size for name, grid in grids.items()}}


def _given(context: Context) -> dict[str, Grid]:
    """Codes and grids of a GPTQ checkpoint as they are; each weight is its grid point."""
    base = Checkpoint(context.model)
    advance = context.start(len(base.packed))
    copy_companions(base.folder, context.folder / "model")
    config = {k: v for k, v in base.config.items() if k != "quantization_config"}
    (context.folder / "model" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    grids: dict[str, Grid] = {}
    inside = tuple(f"{name}." for name in base.packed)
    with CheckpointWriter(context.folder / "model") as writer:
        for name, tensor in base.tensors(n for n in base.headers if not n.startswith(inside)):
            writer.add(name, tensor)
        for name in base.packed:
            codes, grids[name] = read_packed(base, name)
            weight = dequantize(codes, grids[name])
            writer.add(f"{name}.weight", stored_as(weight, grids[name], torch.float16))
            advance()
        biases = [f"{n}.bias" for n in base.packed if f"{n}.bias" in base.headers]
        for name, tensor in base.tensors(biases):
            writer.add(name, tensor)
    return grids


def _compress(context: Context) -> dict[str, Grid]:
    recipe, checkpoint = context.recipe, Checkpoint(context.latest_model())
    config, method = recipe.quantize, quantizer(recipe.quantize.method)
    sparsified = context.path("sparsify")
    packed_masks = load_packed_masks(sparsified) if sparsified else {}
    hessians: dict[str, Tensor] = {}

    def collect(name: str, inputs: Tensor) -> None:
        hessians[name] = hessians.get(name, 0) + inputs.T @ inputs

    samples = calibration(context)
    advance = context.start(checkpoint.blocks)
    grids: dict[str, Grid] = {}
    copy_companions(checkpoint.folder, context.folder / "model")
    with CheckpointWriter(context.folder / "model") as writer:
        for block in walk(checkpoint, samples, collect if method.NEEDS_INPUTS else None):
            compensated: dict[str, Tensor] = {}
            for name, linear in block.linears.items():
                mask = load_mask(packed_masks, name, linear.weight.shape)
                compensated[name], grids[name] = method.compress(
                    linear.weight,
                    mask,
                    config.bits,
                    fallback_group_size(linear.in_features, config.group_size),
                    config.symmetric,
                    hessians.pop(name, None),
                    config.damping,
                )
                linear.weight.copy_(fake_quantize(compensated[name], grids[name]))
            for name, tensor in checkpoint.tensors(checkpoint.block_names(block.index)):
                linear_name = name.removesuffix(".weight")
                if linear_name in compensated and name.endswith(".weight"):
                    grid = grids[linear_name]
                    tensor = stored_as(compensated[linear_name], grid, tensor.dtype)
                writer.add(name, tensor)
            advance()
        for name, tensor in checkpoint.tensors(checkpoint.outer_names()):
            writer.add(name, tensor)
    return grids
