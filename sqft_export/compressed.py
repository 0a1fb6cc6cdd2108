"""Masks, grids and packed layers as the artifacts store them.

masks.safetensors   <linear>                  uint8 [out, ceil(in / 8)], one bit a weight
grids.safetensors   <linear>.scale            float16 [out, groups]
                    <linear>.zero_point       uint8 [out, groups]      (metadata: bits)
merged model        <linear>.qweight, ...     the GPTQ layout (numerics/packing.py)
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from sqft_export.checkpoint import Checkpoint, copy_companions
from sqft_export.numerics.affine import Grid, dequantize
from sqft_export.numerics.masks import unpack_mask
from sqft_export.numerics.packing import from_gptq

MASKS = "masks.safetensors"
GRIDS = "grids.safetensors"


def save_masks(folder: Path, packed: dict[str, Tensor]) -> None:
    """Linear -> mask bits as ``pack_mask`` makes them."""
    save_file(packed, folder / MASKS)


def load_packed_masks(folder: Path) -> dict[str, Tensor]:
    """Linear -> mask bits, uint8 ``[out, ceil(in / 8)]``; empty where nothing was pruned."""
    return load_file(folder / MASKS) if (folder / MASKS).is_file() else {}


def load_mask(packed: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """bool ``[out, in]``, all True for a Linear that was not pruned."""
    if name not in packed:
        return torch.ones(shape, dtype=torch.bool)
    return unpack_mask(packed[name], shape[1])


def save_grids(folder: Path, grids: dict[str, Grid]) -> None:
    tensors = {f"{name}.scale": grid.scale for name, grid in grids.items()}
    tensors |= {f"{name}.zero_point": grid.zero_point for name, grid in grids.items()}
    bits = {str(grid.bits) for grid in grids.values()}
    assert len(bits) == 1, bits
    save_file(tensors, folder / GRIDS, metadata={"bits": bits.pop()})


def load_grids(folder: Path, linears: dict[str, tuple[int, int]]) -> dict[str, Grid]:
    """Linear -> grid; empty where the model is not quantized.

    :param linears: Linear -> (outputs, inputs), which the group sizes follow from.
    """
    if not (folder / GRIDS).is_file():
        return {}
    with safe_open(folder / GRIDS, framework="pt") as file:
        bits = int(file.metadata()["bits"])
        return {
            name: Grid(
                scale := file.get_tensor(f"{name}.scale"),
                file.get_tensor(f"{name}.zero_point"),
                bits,
                inputs // scale.shape[1],
            )
            for name, (_, inputs) in linears.items()
        }


def quantization_config(grids: dict[str, Grid]) -> dict:
    """The ``quantization_config`` of a merged model; odd groups are ``dynamic``."""
    sizes = [grid.group_size for grid in grids.values()]
    common = max(set(sizes), key=sizes.count)
    dynamic = {
        rf"+:^{name}$".replace(".", r"\."): {
            "bits": grid.bits,
            "group_size": -1 if grid.scale.shape[1] == 1 else grid.group_size,
        }
        for name, grid in grids.items()
        if grid.group_size != common
    }
    first = next(iter(grids.values()))
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": first.bits,
        "group_size": common,
        "sym": all(grid.symmetric for grid in grids.values()),
        "desc_act": False,
        "lm_head": False,
        **({"dynamic": dynamic} if dynamic else {}),
    }


def read_packed(checkpoint: Checkpoint, name: str) -> tuple[Tensor, Grid]:
    """Codes uint8 ``[out, in]`` and grid of one Linear of a merged model."""
    keys = [f"{name}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")]
    tensors = {key.rsplit(".", 1)[1]: tensor for key, tensor in checkpoint.tensors(keys)}
    groups, inputs = tensors["scales"].shape[0], tensors["g_idx"].shape[0]
    bits = checkpoint.config["quantization_config"]["bits"]
    return from_gptq(tensors, bits, inputs // groups)


def float_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a model as floats: stored ones as they are, packed ones dequantized."""
    packed = checkpoint.packed
    hidden = tuple(f"{name}." for name in packed)
    plain = [name for name in checkpoint.headers if not name.startswith(hidden)]
    yield from checkpoint.tensors(plain)
    biases = [f"{name}.bias" for name in packed if f"{name}.bias" in checkpoint.headers]
    yield from checkpoint.tensors(biases)
    for name in packed:
        yield f"{name}.weight", dequantize(*read_packed(checkpoint, name))


def load_float_model(folder: Path) -> nn.Module:
    """A merged or plain model in float32, in evaluation mode."""
    checkpoint = Checkpoint(folder)
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights below are already dequantized
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: tensor.float() for name, tensor in float_tensors(checkpoint)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    allowed = {f"{checkpoint.family.head}.weight"} if checkpoint.tied else set()
    assert set(missing) <= allowed and not unexpected, (missing, unexpected)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = model.generation_config.from_pretrained(folder)
    return model.eval()


def write_float_checkpoint(
    source: Checkpoint, folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    """A plain Hugging Face folder of a packed model, such as exporters trace."""
    copy_companions(source.folder, folder)
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in float_tensors(source)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
