"""MXFP4: 32 values of four bits share a power of two (OCP Microscaling Formats, version 1.0).

A value has a sign, two exponent bits and one mantissa bit. A scale is stored as its exponent plus
127. All values are exact in bfloat16.
"""

import torch
from torch import Tensor

_EXPONENT_BIAS = 127
# Magnitude of a code without its sign bit, the highest one.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the values of codes, bfloat16 ``[rows, 32 * blocks]``.

    :param codes: uint8 ``[rows, blocks, 16]``; a byte has two values, the first one in its low
        nibble.
    :param scales: uint8 ``[rows, blocks]``, exponents plus 127.
    """
    table = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
    nibbles = torch.stack((codes & 0x0F, codes >> 4), dim=-1).flatten(-2)
    exponents = scales.to(torch.int32)[..., None] - _EXPONENT_BIAS
    return torch.ldexp(table[nibbles.long()], exponents).flatten(-2).to(torch.bfloat16)
