"""merge: fold the adapter into the base; codes are those of the trained forward."""

import json
import shutil
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from sqft_export.adapters import Layers
from sqft_export.checkpoint import copy_companions
from sqft_export.compressed import (
    MASKS,
    GridWriter,
    float_tensors,
    quantization_config,
)
from sqft_export.numerics.affine import Grid
from sqft_export.numerics.packing import to_gptq
from sqft_export.recipe import Recipe
from sqft_export.stages import Context
from sqft_export.tensorfiles import TensorWriter

CONSUMES = ("sparsify", "quantize", "search")
READS = ()
VERSION = 3
SHARD_BYTES = 2**28  # what is held in memory before it is written


def options(recipe: Recipe) -> dict:
    return {}


@torch.no_grad()
def write_merged(layers: Layers, folder: Path) -> dict[str, float]:
    """A plain Hugging Face folder, GPTQ layout where a layer has a grid; a layer is in memory.

    :return: share of zero weights per Linear, and over all of them (``all``).
    """
    base = layers.checkpoint
    grids: dict[str, Grid] = {}
    zeros: dict[str, int] = {}
    sizes = {name: prod(shape) for name, shape in base.linears.items()}
    weights = {f"{name}.weight" for name in layers.names}
    copy_companions(base.folder, folder)
    with TensorWriter(folder, shard_bytes=SHARD_BYTES) as writer:
        for name, tensor in float_tensors(base, without=weights):
            writer.add(name, tensor)
        for name in layers.names:
            layer, update = layers.layer(name)
            merged: dict[str, Tensor] = {}
            if layer.grid:
                grids[name] = layer.grid
                codes = layer.codes(update)
                merged = to_gptq(codes, layer.grid)
                zero = layer.grid.zero_point.repeat_interleave(layer.grid.group_size, dim=1)
                zeros[name] = int((codes == zero).sum())
            else:
                weight = layer.effective_weight(update).to(layer.weight.dtype)
                merged = {"weight": weight}
                zeros[name] = int((weight == 0).sum())
            for part, packed in merged.items():
                writer.add(f"{name}.{part}", packed)
    outer = {n: grid for n, grid in layers.grids.items() if f"{n}.weight" not in weights}
    if outer:
        with GridWriter(folder) as grid_writer:
            for name, grid in outer.items():
                grid_writer.add(name, grid)
    config = {k: v for k, v in base.config.items() if k != "quantization_config"}
    if grids:
        config["quantization_config"] = quantization_config(grids)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shares = {name: zeros[name] / size for name, size in sizes.items()}
    return shares | {"all": sum(zeros.values()) / sum(sizes.values())}


def run(context: Context) -> dict:
    """Writes ``model/`` and a copy of the mask; the adapter too where it stays apart."""
    adapter, config = context.inputs["search"].path / "adapter", context.recipe.adapt
    if config.apart:
        shutil.copytree(adapter, context.folder / "adapter")
    if sparsified := context.path("sparsify"):
        for file in sparsified.glob(f"{MASKS}*"):
            shutil.copyfile(file, context.folder / file.name)
    sparsity = write_merged(Layers(context.base(), adapter), context.folder / "model")
    warnings = []
    if config.merge_dense and sparsified:
        before = context.inputs["sparsify"].metrics["sparsity"]["all"]
        warnings.append(
            f"merge_dense: a dense update was merged; {sparsity['all']:.1%} of the weights are "
            f"zero, {before:.1%} were before"
        )
    return {"sparsity": sparsity, "warnings": warnings}
