"""The effective weight of an adapted Linear, computed in one pass over memory by compiled C.

    effective = FQ( W + U * scaling * M )        update_gradient = G * inside * M

``U`` is the update ``B A``, ``M`` the mask and ``G`` the gradient of the effective weight.
``inside`` is 1 where the code is not clamped. All arithmetic is float32, in the order of these
formulas. The library (fused.c, CPU) and torch (any device) give the same bits. Without a compiler
torch computes everywhere.
"""

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sqft_export.compiled import built_library
from sqft_export.libraries.torch import openmp_parallel
from sqft_export.numerics.affine import Grid, fake_quantize, fake_quantize_inside
from sqft_export.numerics.masks import bits_to_mask

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _Work(ctypes.Structure):
    """The struct ``Work`` of fused.c."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("weight", "update", "mask", "scale", "zero", "effective")),
        *((n, ctypes.c_void_p) for n in ("gradient", "update_gradient", "scale_gradient")),
        *((n, ctypes.c_size_t) for n in ("rows", "inputs", "group")),
        *((n, ctypes.c_float) for n in ("scaling", "highest")),
        *((n, ctypes.c_int32) for n in ("weight_kind", "effective_kind", "gradient_kind")),
        ("next", ctypes.c_size_t),
    )


class Frozen(NamedTuple):
    """The frozen part of an adapted Linear.

    weight: float ``[out, in]``.
    mask_bits: uint8 ``[out, ceil(in / 8)]``, or None.
    grid: grid of the effective weight, or None.
    """

    weight: Tensor
    mask_bits: Tensor | None
    grid: Grid | None


class Backward(NamedTuple):
    """Results of the backward pass, each ``[out, in]``.

    effective: the effective weight in the gradient's dtype.
    update_gradient: float32.
    scale_gradient: float32, gradient of the logarithm of each weight's scale; or None.
    """

    effective: Tensor
    update_gradient: Tensor
    scale_gradient: Tensor | None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled library, or None if it was not built."""
    file = built_library(Path(__file__).parent, "_fused")
    return ctypes.CDLL(str(file)) if file else None


def _is_supported(base: Frozen, update: Tensor | None, dtype: torch.dtype) -> bool:
    """Return whether the compiled library can compute with these tensors."""
    tensors = [t for t in (base.weight, update, base.mask_bits) if t is not None]
    return (
        _library() is not None
        and all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)
        and base.weight.dtype in _KINDS
        and dtype in (torch.float32, torch.bfloat16)
    )


def _work(base: Frozen, update: Tensor | None, scaling: float, effective: Tensor) -> _Work:
    """Return the arguments of the forward pass."""
    rows, inputs = base.weight.shape
    work = _Work(rows=rows, inputs=inputs, group=inputs, scaling=scaling)
    work.weight, work.weight_kind = base.weight.data_ptr(), _KINDS[base.weight.dtype]
    work.effective, work.effective_kind = effective.data_ptr(), _KINDS[effective.dtype]
    work.update = update.data_ptr() if update is not None else None
    work.mask = base.mask_bits.data_ptr() if base.mask_bits is not None else None
    return work


def _run(work: _Work, grid: Grid | None) -> None:
    """Run the library on all threads of torch."""
    if grid is not None:
        scale, zero = grid.scale.float().contiguous(), grid.zero_point.contiguous()
        work.scale, work.zero = scale.data_ptr(), zero.data_ptr()
        work.group, work.highest = grid.group_size, grid.highest
    threads, library = torch.get_num_threads(), _library()
    assert library is not None  # see _is_supported
    library.sqft_fused(ctypes.byref(work), openmp_parallel() if threads > 1 else None, threads)


def adapted_weight(base: Frozen, update: Tensor | None, scaling: float) -> Tensor:
    """Return ``W + U * scaling * M``, float32 ``[out, in]``.

    :param update: float32 ``[out, in]``, overwritten; None for a Linear without an adapter.
    """
    weight = base.weight.float()
    if update is None:
        return weight
    update.mul_(scaling)
    if base.mask_bits is not None:
        update.mul_(bits_to_mask(base.mask_bits, weight.shape[1]))
    return update.add_(weight)


def effective_weight(
    base: Frozen, update: Tensor | None, scaling: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the effective weight ``[out, in]`` in ``dtype``, the dtype of the product.

    :param update: float32 ``[out, in]``, overwritten; None for a Linear without an adapter.
    """
    if not _is_supported(base, update, dtype):
        adapted = adapted_weight(base, update, scaling)
        return (fake_quantize(adapted, base.grid) if base.grid else adapted).to(dtype)
    if update is not None and dtype == torch.float32:
        effective = update
    else:
        effective = torch.empty(base.weight.shape, dtype=dtype)
    _run(_work(base, update, scaling, effective), base.grid)
    return effective


def backward(
    base: Frozen, update: Tensor, scaling: float, gradient: Tensor, scales: bool
) -> Backward:
    """Recompute the effective weight and return the gradients that pass through it.

    :param update: float32 ``[out, in]``, overwritten.
    :param gradient: gradient of the effective weight, ``[out, in]``, overwritten if it is float32.
    :param scales: also return the gradient of the scales; needs a grid.
    """
    if not _is_supported(base, update, gradient.dtype) or not gradient.is_contiguous():
        return _backward_in_torch(base, update, scaling, gradient, scales)
    effective = torch.empty_like(gradient)
    update_gradient = gradient if gradient.dtype == torch.float32 else torch.empty_like(update)
    work = _work(base, update, scaling, effective)
    work.gradient, work.gradient_kind = gradient.data_ptr(), _KINDS[gradient.dtype]
    work.update_gradient = update_gradient.data_ptr()
    work.scale_gradient = update.data_ptr() if scales else None
    _run(work, base.grid)
    return Backward(effective, update_gradient, update if scales else None)


def _backward_in_torch(
    base: Frozen, update: Tensor, scaling: float, gradient: Tensor, scales: bool
) -> Backward:
    """Compute :func:`backward` on any device."""
    adapted, dtype = adapted_weight(base, update, scaling), gradient.dtype
    update_gradient = gradient.float()
    effective, scale_gradient = adapted, None
    if base.grid is not None:
        effective, inside = fake_quantize_inside(adapted, base.grid)
        if scales:
            scale_gradient = update_gradient * (effective - adapted * inside)
        update_gradient.mul_(inside)
    if base.mask_bits is not None:
        update_gradient.mul_(bits_to_mask(base.mask_bits, update_gradient.shape[1]))
    return Backward(effective.to(dtype), update_gradient, scale_gradient)
