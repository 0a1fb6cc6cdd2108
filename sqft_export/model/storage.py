"""Read and write masks, grids and packed Linears of artifacts.

masks.safetensors   <linear>                       uint8 [out, ceil(in / 8)], one bit per weight
grids.safetensors   <module>.scale                 float16 [out, groups]
                    <module>.zero_point            uint8 [out, groups]
                    <module>.bits_and_group_size   int64 [2]
merged model        <linear>.qweight, ...          the GPTQ layout (numerics/gptq_layout.py)
                    grids.safetensors              grids of embedding and head if these are INT8;
                                                   their weights are stored as floats, which
                                                   loaders expect, and round exactly to the codes

Large masks and grids are sharded like a checkpoint.
"""

import hashlib
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from sqft_export.errors import UserError
from sqft_export.model.checkpoint import GPTQ, PACK_QUANTIZED, Checkpoint
from sqft_export.model.config import QuantizationConfig
from sqft_export.model.existing import stored_grid
from sqft_export.model.tensorfiles import TensorFiles, TensorWriter
from sqft_export.numerics.affine import quantize_rows, replace_zero_scales, row_grid, table_grid
from sqft_export.numerics.codes import Grid, QuantizedWeight
from sqft_export.numerics.gptq_layout import from_gptq, from_pack_quantized, grid_from_gptq
from sqft_export.numerics.masks import bits_to_mask
from sqft_export.recipe.schema import Quantize

GRID_FIELDS = ("bits", "group_size", "sym")  # of a grid in quantization_config
MASKS, GRIDS = "masks", "grids"  # stems of the file names
MAX_BUFFER_BYTES = 16 * 2**20  # tensors that a streaming pass buffers before it writes them


def mask_writer(folder: Path, active: bool = True) -> TensorWriter:
    """Return a writer for the masks of a folder; an inactive one writes nothing."""
    return TensorWriter(folder, MASKS, MAX_BUFFER_BYTES, active)


def load_mask_bits(folder: Path | None) -> dict[str, Tensor]:
    """Return Linear -> mask bits, uint8 ``[out, ceil(in / 8)]``; empty without a folder."""
    if folder is None:
        return {}
    files = TensorFiles(folder, MASKS)
    return dict(files.tensors(files.headers))


def load_mask(folder: Path | None, name: str, shape: torch.Size) -> Tensor:
    """Return the mask of a Linear, bool ``[out, in]``, True = kept.

    :param folder: artifact of sparsify; None, if nothing was pruned, gives a mask of True.
    """
    if folder is None:
        return torch.ones(shape, dtype=torch.bool)
    return bits_to_mask(TensorFiles(folder, MASKS).tensor(name), shape[1])


def load_weight_mask(folder: Path | None, name: str, weight: Tensor) -> Tensor:
    """Return the mask of a Linear's weight on the weight's device, as :func:`load_mask` does."""
    return load_mask(folder, name, weight.shape).to(weight.device)


class GridWriter:
    """Write grids one by one; use it as a context manager."""

    def __init__(self, folder: Path, active: bool = True):
        self.tensors = TensorWriter(folder, GRIDS, MAX_BUFFER_BYTES, active)
        self.sizes: dict[str, tuple[int, int]] = {}

    def add(self, name: str, grid: Grid) -> None:
        """Write the grid of a module."""
        self.sizes[name] = (grid.bits, grid.group_size)
        self.tensors.add(f"{name}.scale", grid.scale)
        self.tensors.add(f"{name}.zero_point", grid.zero_point)
        self.tensors.add(f"{name}.bits_and_group_size", torch.tensor(self.sizes[name]))

    def __enter__(self) -> "GridWriter":
        return self

    def __exit__(self, *failure: object) -> None:
        self.tensors.__exit__(*failure)


def load_grids(folder: Path | None) -> dict[str, Grid]:
    """Return module -> grid; empty if nothing is quantized."""
    if folder is None or not (files := TensorFiles(folder, GRIDS)).exists:
        return {}
    suffix = ".scale"
    names = [name.removesuffix(suffix) for name in files.headers if name.endswith(suffix)]
    return {
        name: Grid(
            files.tensor(f"{name}.scale"),
            files.tensor(f"{name}.zero_point"),
            *files.tensor(f"{name}.bits_and_group_size").tolist(),
        )
        for name in names
    }


def outer_grid(checkpoint: Checkpoint, name: str, weight: Tensor, config: Quantize) -> Grid | None:
    """Return the grid of a tensor outside the blocks; None if it stays in floats.

    :param weight: the tensor ``name``; a vector stays in floats.
    """
    field = checkpoint.family.tables.get(name.removesuffix(".weight"))
    if field is None:
        return row_grid(weight, config.embedding_bits, config.symmetric)
    columns = int(cast(dict[str, int], checkpoint.config)[field])
    return table_grid(weight, columns)


def quantization_config(grids: dict[str, Grid]) -> QuantizationConfig:
    """Return the ``quantization_config`` of a merged model.

    The most frequent settings apply to the model; ``dynamic`` lists Linears with other settings.
    """
    kinds = [_kind(grid) for grid in grids.values()]
    common = max(dict.fromkeys(kinds), key=kinds.count)
    dynamic = {
        rf"+:^{name}$".replace(".", r"\."): dict(zip(GRID_FIELDS, kind, strict=True))
        for name, kind in zip(grids, kinds, strict=True)
        if kind != common
    }
    bits, group_size, symmetric = common
    config = QuantizationConfig(
        quant_method="gptq",
        checkpoint_format="gptq",
        bits=bits,
        group_size=group_size,
        sym=symmetric,
        desc_act=False,
        lm_head=False,
    )
    if dynamic:
        config["dynamic"] = dynamic
    return config


def _kind(grid: Grid) -> tuple[int, int, bool]:
    """Return the values of ``GRID_FIELDS``."""
    per_channel = grid.scale.shape[1] == 1
    return grid.bits, -1 if per_channel else grid.group_size, grid.symmetric


def quantized_names(checkpoint: Checkpoint) -> list[str]:
    """Return the modules with codes: packed Linears, then embedding and head if quantized."""
    return [*checkpoint.quantized_linears, *load_grids(checkpoint.folder)]


def read_quantized(checkpoint: Checkpoint, name: str) -> QuantizedWeight[Tensor]:
    """Return the weight of one module of a quantized model.

    :raises UserError: naming the module, if its layout is not supported or a scale is not finite.
    """
    parts = _layout_of(checkpoint, name)
    if parts is None:
        grid = load_grids(checkpoint.folder)[name]
        return QuantizedWeight(quantize_rows(checkpoint.tensor(f"{name}.weight"), grid), grid)
    tensors = _parts(checkpoint, name, parts)
    try:
        if parts == PACK_QUANTIZED:
            bits = stored_grid(checkpoint.config.get("quantization_config", {})).bits
            return replace_zero_scales(from_pack_quantized(tensors, bits))
        return replace_zero_scales(from_gptq(tensors, *_gptq_sizes(checkpoint, name)))
    except ValueError as error:
        raise UserError(f"{checkpoint.folder}: {name}: {error}") from error


def read_grid(checkpoint: Checkpoint, name: str) -> Grid:
    """Return the grid of a module with the scales that the file stores.

    :func:`read_quantized` may change scales of zero. With the GPTQ layout no codes are read.
    """
    parts = _layout_of(checkpoint, name)
    if parts is None:
        return load_grids(checkpoint.folder)[name]
    if parts == PACK_QUANTIZED:
        return read_quantized(checkpoint, name).grid
    try:
        tensors = _parts(checkpoint, name, GPTQ[1:])
        return grid_from_gptq(tensors, *_gptq_sizes(checkpoint, name))
    except ValueError as error:
        raise UserError(f"{checkpoint.folder}: {name}: {error}") from error


def _layout_of(checkpoint: Checkpoint, name: str) -> tuple[str, ...] | None:
    """Return the names of a packed module's tensors; None if it is stored as floats."""
    layouts = (GPTQ, PACK_QUANTIZED)
    return next((x for x in layouts if f"{name}.{x[0]}" in checkpoint.headers), None)


def _parts(checkpoint: Checkpoint, name: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """Return some tensors of a module, keyed by the last part of their names.

    Old GPTQ checkpoints have no ``g_idx``; their columns are not reordered.
    """
    keys = [f"{name}.{part}" for part in parts if f"{name}.{part}" in checkpoint.headers]
    found = {key.rsplit(".", 1)[1]: tensor for key, tensor in checkpoint.tensors(keys)}
    if "g_idx" in parts and "g_idx" not in found:
        _, inputs = checkpoint.shapes[f"{name}.weight"]
        groups = checkpoint.headers[f"{name}.scales"].shape[0]
        found["g_idx"] = (torch.arange(inputs) // (inputs // groups)).to(torch.int32)
    return found


def _gptq_sizes(checkpoint: Checkpoint, name: str) -> tuple[int, int, int]:
    """Return bits, group size, and the offset that was subtracted from stored zero points."""
    words, groups = (
        checkpoint.headers[f"{name}.{part}"].shape[0] for part in ("qweight", "scales")
    )
    inputs = checkpoint.shapes[f"{name}.weight"][1]
    stored = checkpoint.config.get("quantization_config", {})
    second = stored.get("checkpoint_format") == "gptq_v2"
    return 32 * words // inputs, inputs // groups, 0 if second else 1


def model_facts(checkpoint: Checkpoint, sparsity: float | None = None) -> dict[str, str]:
    """Return the facts that a deployment records about its model.

    weights_sha256 covers all stored tensors in the order of their names.

    :param sparsity: share of zeros in the decoder Linears; None counts them.
    """
    quantization = checkpoint.config.get("quantization_config", {})
    known = {key: str(quantization[key]) for key in ("bits", "group_size", "sym") if quantization}
    sparsity = _zero_share(checkpoint) if sparsity is None else sparsity
    digest = hashlib.sha256()
    for name, tensor in checkpoint.tensors(sorted(checkpoint.headers)):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return {
        "model_type": checkpoint.config["model_type"],
        **known,
        "sparsity": f"{sparsity:.6f}",
        "weights_sha256": digest.hexdigest(),
    }


def _zero_share(checkpoint: Checkpoint) -> float:
    """Count the share of zeros in the decoder Linears."""
    zeros = count = 0
    quantized = set(quantized_names(checkpoint))
    for name in checkpoint.linears:
        weight = read_quantized(checkpoint, name).numpy().steps if name in quantized else None
        if weight is None:
            weight = checkpoint.tensor(f"{name}.weight").float().numpy()
        zeros += int(np.count_nonzero(weight == 0))
        count += weight.size
    return zeros / count


def finite_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return ``dtype``, or float32 if a weight would be infinite in ``dtype``."""
    return dtype if bool(torch.isfinite(weight.to(dtype)).all()) else torch.float32


def plain_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of all tensors except codes and grids of packed Linears."""
    inside = tuple(f"{name}." for name in checkpoint.quantized_linears)
    return [
        name for name in checkpoint.headers if not name.startswith(inside) or name.endswith(".bias")
    ]
