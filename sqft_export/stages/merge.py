"""merge: fold the adapter into the base; codes are those of the trained forward."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from sqft_export.adapters import compressed_layers, load_adapted, load_compressed
from sqft_export.checkpoint import Checkpoint, copy_companions
from sqft_export.compressed import (
    MASKS,
    GridWriter,
    float_tensors,
    load_grids,
    quantization_config,
)
from sqft_export.numerics.affine import Grid
from sqft_export.numerics.packing import to_gptq
from sqft_export.recipe import Recipe
from sqft_export.stages import Context
from sqft_export.tensorfiles import TensorWriter

CONSUMES = ("sparsify", "quantize", "search")
READS = ()
VERSION = 2


def options(recipe: Recipe) -> dict:
    return {}


@torch.no_grad()
def write_merged(
    model: nn.Module, base: Checkpoint, folder: Path, quantized: Path | None
) -> dict[str, float]:
    """A plain Hugging Face folder of ``model``: GPTQ layout where it has a grid.

    :param model: with ``CompressedLinear``s, adapters on them or not.
    :param base: where everything that is not a decoder Linear's weight comes from.
    :param quantized: folder of grids; those of embedding and head go along.
    :return: share of zero weights per Linear, and over all of them (``all``).
    """
    layers = compressed_layers(model)
    grids: dict[str, Grid] = {}
    zeros: dict[str, int] = {}
    copy_companions(base.folder, folder)
    with TensorWriter(folder) as writer:
        for name, tensor in float_tensors(base):
            linear = name.removesuffix(".weight")
            if linear not in layers or not name.endswith(".weight"):
                writer.add(name, tensor)
                continue
            layer, update = layers[linear]
            merged: dict[str, Tensor] = {}
            if layer.grid:
                grids[linear] = layer.grid
                codes = layer.codes(update)
                merged = to_gptq(codes, layer.grid)
                zero = layer.grid.zero_point.repeat_interleave(layer.grid.group_size, dim=1)
                zeros[linear] = int((codes == zero).sum())
            else:
                weight = layer.effective_weight(update).to(tensor.dtype)
                merged = {"weight": weight}
                zeros[linear] = int((weight == 0).sum())
            for part, packed in merged.items():
                writer.add(f"{linear}.{part}", packed)
    outer = {n: grid for n, grid in load_grids(quantized).items() if n not in layers}
    if outer:
        with GridWriter(folder) as grid_writer:
            for name, grid in outer.items():
                grid_writer.add(name, grid)
    config = {k: v for k, v in base.config.items() if k != "quantization_config"}
    if grids:
        config["quantization_config"] = quantization_config(grids)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    total = sum(layer.weight.numel() for layer, _ in layers.values())
    shares = {name: zeros[name] / layer.weight.numel() for name, (layer, _) in layers.items()}
    return shares | {"all": sum(zeros.values()) / total}


def run(context: Context) -> dict:
    """Writes ``model/`` and a copy of the mask; the adapter too where it stays apart."""
    adapter, config = context.inputs["search"].path / "adapter", context.recipe.adapt
    if config.apart:
        model = load_compressed(context.base(), torch.float32)
        shutil.copytree(adapter, context.folder / "adapter")
    else:
        model = load_adapted(context.base(), adapter, torch.float32)
    if sparsified := context.path("sparsify"):
        for file in sparsified.glob(f"{MASKS}*"):
            shutil.copyfile(file, context.folder / file.name)
    base = Checkpoint(context.latest_model())
    sparsity = write_merged(model, base, context.folder / "model", context.path("quantize"))
    warnings = []
    if config.merge_dense and sparsified:
        before = context.inputs["sparsify"].metrics["sparsity"]["all"]
        warnings.append(
            f"merge_dense: a dense update was merged; {sparsity['all']:.1%} of the weights are "
            f"zero, {before:.1%} were before"
        )
    return {"sparsity": sparsity, "warnings": warnings}
