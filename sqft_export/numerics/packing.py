"""The GPTQ checkpoint layout (AutoGPTQ v1), ``f = 32 / bits`` codes in an int32, lowest first:

qweight  int32 [in / f, out]           f consecutive inputs of one output
qzeros   int32 [groups, out / f]       f consecutive outputs, stored as zero_point - 1
scales   float16 [groups, out]
g_idx    int32 [in]                    group of every input column
"""

import torch
from torch import Tensor

from sqft_export.numerics.affine import Grid


def _pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes ``[n, m]`` to int32 ``[ceil(n / f), m]``, the last word filled up."""
    factor = 32 // bits
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, 0, 0, -codes.shape[0] % factor))
    # Little-endian: the codes of a word are its bytes, two to a byte where they are nibbles.
    words = codes.reshape(-1, factor, codes.shape[1]).permute(0, 2, 1)
    if bits == 4:
        words = words[..., 0::2] | (words[..., 1::2] << 4)
    return words.reshape(-1).view(torch.int32).reshape(-1, codes.shape[1])


def _unpack_int32(words: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`_pack_int32`: uint8 ``[n, m]``."""
    count, width = words.shape
    values = words.reshape(-1).contiguous().view(torch.uint8).reshape(count, width, 4)
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], dim=-1).reshape(count, width, 8)
    return values.permute(0, 2, 1).reshape(-1, width)


def to_gptq(codes: Tensor, grid: Grid) -> dict[str, Tensor]:
    """The four tensors of the GPTQ layout for codes uint8 ``[out, in]``.

    Widths that do not fill the last int32 are padded with zero bits; ``from_gptq`` drops them.
    """
    in_features = codes.shape[1]
    stored_zeros = (grid.zero_point.to(torch.int64) - 1) & grid.highest
    return {
        "qweight": _pack_int32(codes.T.contiguous(), grid.bits),
        "qzeros": _pack_int32(stored_zeros, grid.bits).T.contiguous(),
        "scales": grid.scale.T.contiguous(),
        "g_idx": (torch.arange(in_features) // grid.group_size).to(torch.int32),
    }


def from_gptq(tensors: dict[str, Tensor], bits: int, group_size: int) -> tuple[Tensor, Grid]:
    """Codes uint8 ``[out, in]`` and grid of a layer in the GPTQ layout.

    :raises ValueError: if ``g_idx`` is not ``column // group_size`` (``desc_act`` checkpoints).
    """
    g_idx, scales = tensors["g_idx"], tensors["scales"]
    in_features, out_features = g_idx.shape[0], scales.shape[1]
    if not torch.equal(g_idx, (torch.arange(in_features) // group_size).to(g_idx.dtype)):
        raise ValueError("g_idx is not in column order (desc_act=true); this layout is not taken")
    codes = _unpack_int32(tensors["qweight"], bits)[:in_features].T.contiguous()
    zeros = _unpack_int32(tensors["qzeros"].T.contiguous(), bits)[:out_features]
    zero_point = ((zeros.to(torch.int64) + 1) & (2**bits - 1)).to(torch.uint8)
    return codes, Grid(scales.T.contiguous(), zero_point, bits, group_size)
