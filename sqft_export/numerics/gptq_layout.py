"""The GPTQ checkpoint layout (AutoGPTQ v1) of 4 or 8 bits, and that of compressed-tensors.

An int32 holds ``f = 32 / bits`` codes, the first in its lowest bits.

qweight  int32 [in / f, out]           f consecutive inputs of one output
qzeros   int32 [groups, out / f]       f consecutive outputs, stored as zero_point - 1
scales   float16 [groups, out]
g_idx    int32 [in]                    group of every input column
"""

import numpy as np
import torch
from torch import Tensor

from sqft_export.numerics.codes import Grid, QuantizedWeight
from sqft_export.numerics.nibbles import pack_nibbles, unpack_nibbles


def _pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 ``[n, m]`` into int32 ``[n, ceil(m / f)]``; zeros pad the last word."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (32 // bits))).numpy()
    # Words are little-endian: a word is its codes as bytes, or two 4-bit codes per byte.
    stored = pack_nibbles(padded) if bits == 4 else np.array(padded, order="C")
    return torch.from_numpy(stored.view(np.int32))


def _unpack_int32(words: Tensor, bits: int) -> Tensor:
    """Return the codes of :func:`_pack_int32` with their padding, uint8 ``[n, words * f]``."""
    stored = np.ascontiguousarray(words.numpy()).view(np.uint8)
    return torch.from_numpy(unpack_nibbles(stored, 2 * stored.shape[1]) if bits == 4 else stored)


def to_gptq(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the four tensors of the GPTQ layout.

    Zero bits pad the last int32; ``from_gptq`` drops them.
    """
    codes, grid = weight
    in_features = codes.shape[1]
    stored_zeros = (grid.zero_point - 1) & grid.highest  # 0 wraps to the highest code
    return {
        "qweight": _pack_int32(codes, grid.bits).T.contiguous(),
        "qzeros": _pack_int32(stored_zeros.T, grid.bits),
        "scales": grid.scale.T.contiguous(),
        "g_idx": (torch.arange(in_features) // grid.group_size).to(torch.int32),
    }


def from_gptq(
    tensors: dict[str, Tensor], bits: int, group_size: int, stored_minus: int = 1
) -> QuantizedWeight:
    """Return the weight of a layer in the GPTQ layout.

    :param stored_minus: value that was subtracted from the zero points before storing: 1, or 0 in
        version 2 of the layout (``checkpoint_format: gptq_v2``).
    :raises ValueError: if ``g_idx`` is not ``column // group_size`` (``desc_act`` checkpoints).
    """
    grid = grid_from_gptq(tensors, bits, group_size, stored_minus)
    in_features = tensors["g_idx"].shape[0]
    # Transposing the words moves fewer elements than transposing the codes: 1 / f of them.
    codes = _unpack_int32(tensors["qweight"].T, bits)[:, :in_features].contiguous()
    return QuantizedWeight(codes, grid)


def grid_from_gptq(
    tensors: dict[str, Tensor], bits: int, group_size: int, stored_minus: int = 1
) -> Grid:
    """Return the grid of :func:`from_gptq` without reading ``qweight``.

    :raises ValueError: if ``g_idx`` is not ``column // group_size`` (``desc_act`` checkpoints).
    """
    g_idx, scales = tensors["g_idx"], tensors["scales"]
    if not torch.equal(g_idx, (torch.arange(len(g_idx)) // group_size).to(g_idx.dtype)):
        raise ValueError(
            "g_idx is not in column order (desc_act=true); this layout is not supported"
        )
    zeros = _unpack_int32(tensors["qzeros"], bits)[:, : scales.shape[1]].T.contiguous()
    zero_point = (zeros + stored_minus) & (2**bits - 1)
    return Grid(scales.T.contiguous(), zero_point, bits, group_size)


def from_pack_quantized(tensors: dict[str, Tensor], bits: int) -> QuantizedWeight:
    """Return the weight of a layer in the ``pack-quantized`` format.

    The format comes from compressed-tensors:

    weight_packed  int32 [out, ceil(in / f)]   f consecutive inputs, lowest first, plus 2^(bits-1)
    weight_scale   [out, groups]               any float dtype; values must be exact in float16
    weight_shape   int64 [2]

    :raises ValueError: if a scale is not exact in float16.
    """
    in_features = int(tensors["weight_shape"][1])
    codes = _unpack_int32(tensors["weight_packed"], bits)[:, :in_features].contiguous()
    scale = tensors["weight_scale"].to(torch.float16)
    if not torch.equal(scale.float(), tensors["weight_scale"].float()):
        raise ValueError(
            "its scales are not exact in float16, the dtype in which runtimes store them"
        )
    zero_point = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
    grid = Grid(scale.contiguous(), zero_point, bits, in_features // scale.shape[1])
    return QuantizedWeight(codes, grid)
