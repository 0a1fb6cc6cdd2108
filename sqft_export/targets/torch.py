"""torch: the reference that the runtimes are compared with.

It computes in float32, or in bfloat16 on a GPU and on CPUs where that is faster. On a GPU the INT4
Linears of a merged model stay INT4, in torch's layout and with torch's matmul.
"""

import inspect
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sqft_export.libraries.torch import INNER_K_TILES, pack_int4
from sqft_export.machine.device import CPU, fast_in_bfloat16
from sqft_export.machine.host import float32_fits
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.families import FAMILIES
from sqft_export.model.floats import load_model
from sqft_export.model.storage import read_quantized
from sqft_export.numerics.affine import dequantize
from sqft_export.numerics.codes import QuantizedWeight
from sqft_export.targets import Session, positions_of
from sqft_export.targets.devices import find_device
from sqft_export.targets.faults import names_device_faults

INT4_GROUP_SIZES = (32, 64, 128, 256)
ACCELERATOR_PASS_TOKENS = 2048  # tokens that take as long as the overhead of one more pass


class Int4Linear(nn.Module):
    """Compute ``x @ W.T + bias`` with INT4 codes in torch's layout, dequantized in the kernel.

    torch defines ``W = (code - 8) * scale + shift``, hence ``shift = (8 - zero_point) * scale``.
    """

    def __init__(
        self,
        weight: QuantizedWeight[torch.Tensor],
        bias: torch.Tensor | None,
        device: str,
        dtype: torch.dtype,
    ):
        super().__init__()
        scale, zero = weight.scale.float(), weight.zero_point.float()
        self.group_size, self.bias = weight.grid.group_size, bias
        table = torch.stack([scale, (8 - zero) * scale], dim=-1).transpose(0, 1).contiguous()
        self.register_buffer("table", table.to(device, dtype))
        stored, self.product = pack_int4(weight.codes, device)
        self.register_buffer("stored", stored)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = self.product(flat, self.stored, self.group_size, self.table)
        out = out.reshape(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


class StoredLinear(nn.Module):
    """Compute ``x @ W.T + bias`` with a weight that is dequantized or cast at every call.

    Only its stored form stays in memory.

    :param weight: returns the weight, float ``[out, in]``.
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
    """Return name -> INT4 Linear in torch's layout.

    torch's layout does not support other bits, other group sizes and widths that its tiles do not
    divide.

    :param lean: return all other quantized Linears as :class:`StoredLinear`; else leave them out.
    """
    found: dict[str, nn.Module] = {}
    for name in checkpoint.quantized_linears:
        weight = read_quantized(checkpoint, name)
        codes, grid = weight
        key = f"{name}.bias"
        bias = checkpoint.tensor(key).to(device, dtype) if key in checkpoint.headers else None
        tiles = INNER_K_TILES.get(device)
        fits_tiles = tiles and codes.shape[1] % (16 * tiles) == 0 and codes.shape[0] % 16 == 0
        if grid.bits == 4 and grid.group_size in INT4_GROUP_SIZES and fits_tiles:
            found[name] = Int4Linear(weight, bias, device, dtype)
        elif lean:
            found[name] = StoredLinear(partial(dequantize, *weight), bias)
    return found


def load_int4_model(folder: Path, device: str, dtype: torch.dtype) -> nn.Module:
    """Load a merged model whose INT4 Linears are :class:`Int4Linear`; others have ``dtype``."""
    checkpoint = Checkpoint(folder)
    quantized = _quantized_linears(checkpoint, device, dtype, lean=False)
    return load_model(checkpoint, dtype, quantized).to(device)


def load_lean_model(folder: Path) -> nn.Module:
    """Load a model with weights in their stored form; products are computed in float32.

    It takes as much memory as its files.
    """
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
    """Return bfloat16 on an accelerator, and on the CPU if the model is 16-bit and it is faster.

    The norms decide whether a model is 16-bit: Linears, embedding and head may be quantized.

    :param precision: the faster dtype on the CPU, as a run has decided; None: measure it.
    """
    norm = next(n for n in checkpoint.outer_names() if len(checkpoint.headers[n].shape) == 1)
    is_16_bit = checkpoint.dtype(norm).itemsize == 2
    faster = precision == "bfloat16" if precision else is_16_bit and fast_in_bfloat16(CPU)
    return torch.bfloat16 if device != "cpu" or (is_16_bit and faster) else torch.float32


def _load_on_cpu(folder: Path, precision: str | None) -> nn.Module:
    """Load a model in its faster dtype; in float32, dequantized if the weights fit in memory."""
    checkpoint = Checkpoint(folder)
    if fast_dtype(checkpoint, "cpu", precision) == torch.bfloat16:
        return load_int4_model(folder, "cpu", torch.bfloat16)
    if float32_fits(sum(prod(shape) for shape in checkpoint.shapes.values())):
        return load_model(checkpoint)
    return load_lean_model(folder)


class TorchSession(Session):
    """A session of a Hugging Face causal LM."""

    padding = "left"
    computes_padding = True

    def __init__(self, model: nn.Module, device: str = "cpu"):
        self.model, self.device = model, device
        if device != "cpu":
            self.pass_tokens = ACCELERATOR_PASS_TOKENS
        inner = getattr(model, "get_base_model", lambda: model)()  # inside peft's wrapper
        self.accepted = inspect.signature(inner.forward).parameters
        family = FAMILIES.get(inner.config.model_type)
        self.joins = not (family and family.recurrent)
        self.vocabulary: int = inner.config.get_text_config().vocab_size
        self.all_logits = "logits_to_keep" not in self.accepted
        self.reset()

    def reset(self) -> None:
        self.cache = None

    def select(self, rows: np.ndarray) -> None:
        assert self.cache is not None
        self.cache.reorder_cache(torch.from_numpy(rows).to(self.device))

    @names_device_faults
    @torch.no_grad()
    def forward(
        self, ids: np.ndarray, mask: np.ndarray | None = None, last: int | None = None
    ) -> np.ndarray:
        arrays = {"input_ids": ids}
        if mask is not None:
            arrays |= {"attention_mask": mask, "position_ids": positions_of(mask, ids.shape[1])}
        inputs = {
            name: torch.from_numpy(array).to(self.device)
            for name, array in arrays.items()
            if name in self.accepted
        }
        if last and not self.all_logits:
            # Indices copy the last tokens. A slice is a view that is not contiguous, for which
            # torch's bfloat16 product took 150 times as long.
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
    """Load a Hugging Face folder, merged or original, into a session.

    :param exact: on the CPU, compute in float32; else in its fastest dtype. A GPU ignores it.
    :param threads: CPU threads.
    :param device: cpu or gpu. On a GPU: bfloat16, and INT4 weights stay INT4.
    :param precision: see :func:`fast_dtype`.
    :raises UserError: if the device is unavailable.
    """
    if threads:
        torch.set_num_threads(threads)
    if device == "cpu":
        return TorchSession(
            load_model(Checkpoint(folder)) if exact else _load_on_cpu(folder, precision)
        )
    name = find_device("torch", device).name
    return TorchSession(load_int4_model(folder, name, torch.bfloat16), name)
