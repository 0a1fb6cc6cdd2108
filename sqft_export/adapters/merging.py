"""Write a merged model to disk, one layer at a time."""

from math import prod
from pathlib import Path

import torch

from sqft_export.adapters.loading import Layers
from sqft_export.model.companions import copy_companions, float_config, write_config
from sqft_export.model.floats import float_tensors
from sqft_export.model.storage import GridWriter, quantization_config
from sqft_export.numerics.affine import Grid, fake_quantize_rows

_SHARD_BYTES = 2**28  # held in memory before a shard is written


@torch.no_grad()
def write_merged(layers: Layers, folder: Path) -> dict[str, float]:
    """Write a plain Hugging Face folder, in the GPTQ layout where a layer has a grid.

    One layer is in memory at a time.

    :return: share of zero weights per Linear, and over all of them (``all``).
    """
    base = layers.checkpoint
    grids: dict[str, Grid] = {}
    zeros: dict[str, int] = {}
    sizes = {name: prod(shape) for name, shape in base.linears.items()}
    weights = {f"{name}.weight" for name in layers.names}
    copy_companions(base.folder, folder)
    with base.writer(folder, _SHARD_BYTES) as writer:
        for name, tensor in float_tensors(base, without=weights):
            grid = layers.grids.get(name.removesuffix(".weight"))
            # Stock readers then compute with the same numbers: grid points are exact in float32.
            writer.add(name, tensor if grid is None else fake_quantize_rows(tensor, grid))
        for name in layers.names:
            layer, update = layers.layer(name)
            merged = layer.merged(update)
            if merged.grid:
                grids[name] = merged.grid
            zeros[name] = merged.zeros
            for part, tensor in merged.tensors.items():
                writer.add(f"{name}.{part}", tensor)
    _write_outer_grids(layers, folder)
    config = float_config(base.config)
    if grids:
        config["quantization_config"] = quantization_config(grids)
    write_config(folder, config)
    shares = {name: zeros[name] / size for name, size in sizes.items()}
    return shares | {"all": sum(zeros.values()) / sum(sizes.values())}


def _write_outer_grids(layers: Layers, folder: Path) -> None:
    """Write the grids of embedding and head where these are quantized."""
    outer = {name: grid for name, grid in layers.grids.items() if name not in layers.names}
    if outer:
        with GridWriter(folder) as writer:
            for name, grid in outer.items():
                writer.add(name, grid)
