"""Masks, grids and packed layers as the artifacts store them.

masks.safetensors   <linear>                       uint8 [out, ceil(in / 8)], one bit a weight
grids.safetensors   <module>.scale                 float16 [out, groups]
                    <module>.zero_point            uint8 [out, groups]
                    <module>.bits_and_group_size   int64 [2]
merged model        <linear>.qweight, ...          the GPTQ layout (numerics/packing.py)
                    grids.safetensors              of embedding and head where these are INT8;
                                                   loaders take them plain, so they are stored as
                                                   floats that round to their codes on these grids

The first two are sharded like a checkpoint where they are large.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sqft_export.errors import UserError
from sqft_export.model.checkpoint import GPTQ, PACK_QUANTIZED, Checkpoint
from sqft_export.model.existing import stored_grid
from sqft_export.model.tensorfiles import TensorFiles, TensorWriter
from sqft_export.numerics.affine import Grid, quantize, replace_zero_scales
from sqft_export.numerics.codes import Quantized
from sqft_export.numerics.gptq_layout import from_gptq, from_pack_quantized, grid_from_gptq
from sqft_export.numerics.masks import bits_to_mask

MASKS, GRIDS = "masks", "grids"  # stems of their files
HELD_BYTES = 16 * 2**20  # what a pass that streams holds before it is written


def mask_writer(folder: Path) -> TensorWriter:
    return TensorWriter(folder, MASKS, HELD_BYTES)


def load_mask_bits(folder: Path | None) -> dict[str, Tensor]:
    """Linear -> mask bits, uint8 ``[out, ceil(in / 8)]``; empty where nothing was pruned."""
    if folder is None:
        return {}
    files = TensorFiles(folder, MASKS)
    return dict(files.tensors(files.headers))


def load_mask(folder: Path | None, name: str, shape: torch.Size) -> Tensor:
    """bool ``[out, in]``, all True for a Linear that was not pruned.

    :param folder: artifact of sparsify, None where the recipe does without.
    """
    if folder is None:
        return torch.ones(shape, dtype=torch.bool)
    return bits_to_mask(TensorFiles(folder, MASKS).tensor(name), shape[1])


def mask_for(folder: Path | None, name: str, weight: Tensor) -> Tensor:
    """The same for a Linear's weight, on its device."""
    return load_mask(folder, name, weight.shape).to(weight.device)


class GridWriter:
    """Writes grids as they come; a context manager."""

    def __init__(self, folder: Path):
        self._tensors = TensorWriter(folder, GRIDS, HELD_BYTES)
        self.sizes: dict[str, tuple[int, int]] = {}

    def add(self, name: str, grid: Grid) -> None:
        self.sizes[name] = (grid.bits, grid.group_size)
        self._tensors.add(f"{name}.scale", grid.scale)
        self._tensors.add(f"{name}.zero_point", grid.zero_point)
        self._tensors.add(f"{name}.bits_and_group_size", torch.tensor(self.sizes[name]))

    def __enter__(self) -> "GridWriter":
        return self

    def __exit__(self, *failure: object) -> None:
        self._tensors.__exit__(*failure)


def load_grids(folder: Path | None) -> dict[str, Grid]:
    """Module -> grid; empty where nothing is quantized."""
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


def quantization_config(grids: dict[str, Grid]) -> dict:
    """The ``quantization_config`` of a merged model; what differs in a layer is ``dynamic``."""
    kinds = [_kind(grid) for grid in grids.values()]
    common = max(dict.fromkeys(kinds), key=kinds.count)
    dynamic = {
        rf"+:^{name}$".replace(".", r"\."): dict(kind)
        for name, kind in zip(grids, kinds, strict=True)
        if kind != common
    }
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        **dict(common),
        "desc_act": False,
        "lm_head": False,
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _kind(grid: Grid) -> tuple[tuple[str, int | bool], ...]:
    per_channel = grid.scale.shape[1] == 1
    return (
        ("bits", grid.bits),
        ("group_size", -1 if per_channel else grid.group_size),
        ("sym", grid.symmetric),
    )


def quantized_names(checkpoint: Checkpoint) -> list[str]:
    """Modules with codes: packed Linears, then embedding and head where these have a grid."""
    return [*checkpoint.quantized_linears, *load_grids(checkpoint.folder)]


def read_quantized(checkpoint: Checkpoint, name: str) -> tuple[Tensor, Grid]:
    """Codes uint8 ``[out, in]`` and grid of one module of a quantized model.

    :raises UserError: naming the module, if its layout is none that is taken, or a scale is no
        number.
    """
    parts = _layout_of(checkpoint, name)
    if parts is None:
        grid = load_grids(checkpoint.folder)[name]
        return quantize(checkpoint.tensor(f"{name}.weight"), grid), grid
    tensors = _parts(checkpoint, name, parts)
    try:
        if parts == PACK_QUANTIZED:
            bits = stored_grid(checkpoint.config.get("quantization_config", {})).bits
            return replace_zero_scales(*from_pack_quantized(tensors, bits))
        return replace_zero_scales(*from_gptq(tensors, *_gptq_sizes(checkpoint, name)))
    except ValueError as error:
        raise UserError(f"{checkpoint.folder}: {name}: {error}") from error


def read_grid(checkpoint: Checkpoint, name: str) -> Grid:
    """The grid of :func:`read_quantized`, scales as they are stored.

    Of the GPTQ layout the codes are not read.
    """
    parts = _layout_of(checkpoint, name)
    if parts is None:
        return load_grids(checkpoint.folder)[name]
    if parts == PACK_QUANTIZED:
        return read_quantized(checkpoint, name)[1]
    try:
        tensors = _parts(checkpoint, name, GPTQ[1:])
        return grid_from_gptq(tensors, *_gptq_sizes(checkpoint, name))
    except ValueError as error:
        raise UserError(f"{checkpoint.folder}: {name}: {error}") from error


def _layout_of(checkpoint: Checkpoint, name: str) -> tuple[str, ...] | None:
    """The parts that a module's codes are stored as; None where it is stored as floats."""
    layouts = (GPTQ, PACK_QUANTIZED)
    return next((x for x in layouts if f"{name}.{x[0]}" in checkpoint.headers), None)


def _parts(checkpoint: Checkpoint, name: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """Return some tensors of a module by the last part of their names.

    Old GPTQ checkpoints have no ``g_idx``; their columns are in order.
    """
    keys = [f"{name}.{part}" for part in parts if f"{name}.{part}" in checkpoint.headers]
    found = {key.rsplit(".", 1)[1]: tensor for key, tensor in checkpoint.tensors(keys)}
    if "g_idx" in parts and "g_idx" not in found:
        _, inputs = checkpoint.shapes[f"{name}.weight"]
        groups = checkpoint.headers[f"{name}.scales"].shape[0]
        found["g_idx"] = (torch.arange(inputs) // (inputs // groups)).to(torch.int32)
    return found


def _gptq_sizes(checkpoint: Checkpoint, name: str) -> tuple[int, int, int]:
    """Bits, group size, and what was taken from zero points before they were stored."""
    words, groups = (
        checkpoint.headers[f"{name}.{part}"].shape[0] for part in ("qweight", "scales")
    )
    inputs = checkpoint.shapes[f"{name}.weight"][1]
    stored = checkpoint.config.get("quantization_config", {})
    second = stored.get("checkpoint_format") == "gptq_v2"
    return 32 * words // inputs, inputs // groups, 0 if second else 1


def quantized_arrays(checkpoint: Checkpoint, name: str) -> Quantized:
    """The same as arrays, as targets read their files back."""
    codes, grid = read_quantized(checkpoint, name)
    return grid_arrays(codes, grid)


def grid_arrays(codes: Tensor, grid: Grid) -> Quantized:
    return Quantized(codes.numpy(), grid.scale.numpy(), grid.zero_point.numpy())


def model_facts(checkpoint: Checkpoint, sparsity: float | None = None) -> dict[str, str]:
    """What a deployment says of the model it was made from.

    weights_sha256: of all tensors in the order of their names, as they are stored.

    :param sparsity: share of zeros in the Linears where it is known; None: it is counted.
    """
    quantization = checkpoint.config.get("quantization_config", {})
    known = {key: str(quantization[key]) for key in ("bits", "group_size", "sym") if quantization}
    sparsity = _count_zeros(checkpoint) if sparsity is None else sparsity
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


def _count_zeros(checkpoint: Checkpoint) -> float:
    """Share of zeros in the decoder Linears."""
    zeros = count = 0
    quantized = set(quantized_names(checkpoint))
    for name in checkpoint.linears:
        weight = quantized_arrays(checkpoint, name).steps if name in quantized else None
        if weight is None:
            weight = checkpoint.tensor(f"{name}.weight").float().numpy()
        zeros += int(np.count_nonzero(weight == 0))
        count += weight.size
    return zeros / count


def dtype_that_holds(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or float32 where a weight would be infinite in it."""
    return dtype if bool(torch.isfinite(weight.to(dtype)).all()) else torch.float32


def plain_names(checkpoint: Checkpoint) -> list[str]:
    """Tensors stored as they are: all but the codes and grids of packed Linears."""
    inside = tuple(f"{name}." for name in checkpoint.quantized_linears)
    return [
        name for name in checkpoint.headers if not name.startswith(inside) or name.endswith(".bias")
    ]
