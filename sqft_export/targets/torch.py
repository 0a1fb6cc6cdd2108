"""torch: the reference that the runtimes are compared with, in float32; in bfloat16 where that is
faster and on a GPU.

On a GPU the INT4 Linears of a merged model stay INT4, in torch's own layout and matmul.
"""

import inspect
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.floats import load_model
from sqft_export.model.storage import read_quantized
from sqft_export.numerics.affine import Grid, dequantize
from sqft_export.run.device import CPU, fast_in_bfloat16
from sqft_export.run.host import float32_fits
from sqft_export.targets import Session, positions_of
from sqft_export.targets.devices import find_device

PACKED_GROUPS = (32, 64, 128, 256)
ACCELERATED = 2048  # tokens that take an accelerator as long as another pass
TILES = {"cpu": 2, "cuda": 8}  # of 16 inputs each, which a block of it is deep


class Int4Linear(nn.Module):
    """``x @ W.T + bias`` with INT4 codes in torch's layout, dequantized inside the product.

    torch has ``W = (code - 8) * scale + shift``, hence ``shift = (8 - zero_point) * scale``.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        grid: Grid,
        bias: torch.Tensor | None,
        device: str,
        dtype: torch.dtype,
    ):
        super().__init__()
        scale, zero = grid.scale.float(), grid.zero_point.float()
        self.group_size, self.bias = grid.group_size, bias
        table = torch.stack([scale, (8 - zero) * scale], dim=-1).transpose(0, 1).contiguous()
        self.register_buffer("table", table.to(device, dtype))
        if device == "cpu":
            stored = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), TILES[device])
            self.product = torch.ops.aten._weight_int4pack_mm_for_cpu
        else:
            pairs = (codes[:, 0::2] << 4 | codes[:, 1::2]).to(torch.uint8).to(device)
            stored = torch.ops.aten._convert_weight_to_int4pack(pairs, TILES[device])
            self.product = torch.ops.aten._weight_int4pack_mm
        self.register_buffer("stored", stored)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = self.product(flat, self.stored, self.group_size, self.table)
        out = out.reshape(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


class StoredLinear(nn.Module):
    """``x @ W.T + bias`` with a weight that is made or cast each time, so that its stored form
    alone stays in memory.

    :param weight: gives float ``[out, in]``.
    """

    def __init__(self, weight: Callable[[], torch.Tensor], bias: torch.Tensor | None):
        super().__init__()
        self.weight_of, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight_of().to(x.dtype), bias)


def _quantized_linears(
    checkpoint: Checkpoint, device: str, dtype: torch.dtype, lean: bool
) -> dict[str, nn.Module]:
    """INT4 Linears in torch's layout; others, if ``lean``, from their codes.

    What torch's layout can't hold: other bits, other group sizes, odd widths.
    """
    found: dict[str, nn.Module] = {}
    for name in checkpoint.quantized_linears:
        codes, grid = read_quantized(checkpoint, name)
        key = f"{name}.bias"
        bias = checkpoint.tensor(key).to(device, dtype) if key in checkpoint.headers else None
        tiles = TILES.get(device)
        deep = tiles and codes.shape[1] % (16 * tiles) == 0 and codes.shape[0] % 16 == 0
        if grid.bits == 4 and grid.group_size in PACKED_GROUPS and deep:
            found[name] = Int4Linear(codes, grid, bias, device, dtype)
        elif lean:
            found[name] = StoredLinear(partial(dequantize, codes, grid), bias)
    return found


def load_int4_model(folder: Path, device: str, dtype: torch.dtype) -> nn.Module:
    """A merged model whose INT4 Linears are :class:`Int4Linear`; others are floats of ``dtype``."""
    checkpoint = Checkpoint(folder)
    quantized = _quantized_linears(checkpoint, device, dtype, lean=False)
    return load_model(checkpoint, dtype, quantized).to(device)


def load_lean_model(folder: Path) -> nn.Module:
    """A model in the memory that its files take: weights as stored, products in float32."""
    checkpoint = Checkpoint(folder)
    model = load_model(
        checkpoint, None, _quantized_linears(checkpoint, "cpu", torch.float32, lean=True)
    )
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            weight = module.weight
            model.set_submodule(name, StoredLinear(lambda w=weight: w, module.bias))  # type: ignore[misc]
        elif isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _module, _args, found: found.float())
        elif not isinstance(module, Int4Linear | StoredLinear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    return model


def fast_dtype(checkpoint: Checkpoint, device: str, precision: str | None = None) -> torch.dtype:
    """bfloat16 on an accelerator, and on the CPU where the model is of 16 bits and that is faster.

    What a model is of, its norms say: Linears, an embedding and a head may be points of a grid.

    :param precision: the faster one on the CPU, as a run has decided; None: it is measured.
    """
    norm = next(n for n in checkpoint.outer_names() if len(checkpoint.headers[n].shape) == 1)
    narrow = checkpoint.dtype(norm).itemsize == 2
    faster = precision == "bfloat16" if precision else narrow and fast_in_bfloat16(CPU)
    return torch.bfloat16 if device != "cpu" or (narrow and faster) else torch.float32


def _load_on_cpu(folder: Path, precision: str | None) -> nn.Module:
    """As fast as it is here; in float32, all of it in memory if there is room."""
    checkpoint = Checkpoint(folder)
    if fast_dtype(checkpoint, "cpu", precision) == torch.bfloat16:
        return load_int4_model(folder, "cpu", torch.bfloat16)
    if float32_fits(sum(prod(shape) for shape in checkpoint.shapes.values())):
        return load_model(checkpoint)
    return load_lean_model(folder)


class TorchSession(Session):
    """A Hugging Face causal LM and its cache."""

    padding = "left"
    fills_up = True

    def __init__(self, model: nn.Module, device: str = "cpu"):
        self.model, self.device = model, device
        if device != "cpu":
            self.pass_tokens = ACCELERATED
        own: Any = getattr(model, "get_base_model", lambda: model)()  # within peft's
        self.accepted = inspect.signature(own.forward).parameters
        self.vocabulary: int = own.config.get_text_config().vocab_size
        self.all_logits = "logits_to_keep" not in self.accepted
        self.reset()

    def reset(self) -> None:
        self.cache = None

    def select(self, rows: np.ndarray) -> None:
        assert self.cache is not None
        self.cache.reorder_cache(torch.from_numpy(rows).to(self.device))

    @torch.no_grad()
    def forward(
        self, ids: np.ndarray, mask: np.ndarray | None = None, last: int | None = None
    ) -> np.ndarray:
        arrays = {"input_ids": ids}
        if mask is not None:
            arrays |= {"attention_mask": mask, "position_ids": positions_of(mask, ids.shape[1])}
        inputs: dict[str, Any] = {
            name: torch.from_numpy(array).to(self.device)
            for name, array in arrays.items()
            if name in self.accepted
        }
        if last and not self.all_logits:
            # As indices, which copy: a view of the last tokens is no whole block of memory, and of
            # such a one torch's bfloat16 product took 150 times as long.
            inputs["logits_to_keep"] = torch.arange(ids.shape[1], device=self.device)[-last:]
        output = self.model(**inputs, past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        return output.logits[:, -(last or ids.shape[1]) :].float().cpu().numpy()


def open_session(
    folder: Path,
    exact: bool,
    threads: int | None,
    device: str = "cpu",
    precision: str | None = None,
) -> TorchSession:
    """A merged or plain Hugging Face folder.

    :param exact: float32 throughout; else as fast as this machine has it.
    :param device: cpu; gpu: bfloat16, INT4 weights stay INT4.
    :param precision: see :func:`fast_dtype`.
    :raises UserError: if the device is not here.
    """
    if threads:
        torch.set_num_threads(threads)
    if device == "cpu":
        return TorchSession(
            load_model(Checkpoint(folder)) if exact else _load_on_cpu(folder, precision)
        )
    name = find_device("torch", device).name
    return TorchSession(load_int4_model(folder, name, torch.bfloat16), name)
