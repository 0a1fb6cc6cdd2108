"""Blocks of llama.cpp's quantized tensors: a float16 scale, then 32 weights of a row.

    Q4_0   d, 16 bytes of codes      w = d (q - 8)
    Q4_1   d, m, 16 bytes of codes   w = d q + m
    Q8_0   d, 32 signed bytes        w = d q

Byte j of a 4-bit block holds code j in its low half and code j + 16 in its high half (ggml's
``ggml-common.h``, ``dequantize_row_q4_0``). A symmetric grid is Q4_0 or Q8_0; each block of a group
repeats the scale. An asymmetric grid is Q4_1 with ``m = -d z``, if that is exact in float16.
"""

from dataclasses import dataclass

import numpy as np

from sqft_export.numerics.codes import QuantizedWeight, from_arrays
from sqft_export.packed.blocks import BLOCK, ZERO_CODE_4BIT, block_bytes, join_blocks, split_blocks
from sqft_export.packed.regions import GGUF_BLOCKS

MIDDLE8 = 128
NO_ZERO_POINT = 255  # returned for an offset that is not a zero point of the grid


@dataclass(frozen=True)
class BlockType:
    """A block type of ggml.

    name: ggml's name.
    floats: float16 numbers before the codes.
    """

    name: str
    bits: int
    floats: int

    @property
    def bytes(self) -> int:
        """Bytes per block."""
        return block_bytes(self.bits, self.floats)


BLOCK_TYPES = {name: BlockType(name, *parts) for name, parts in GGUF_BLOCKS.items()}
Q4_0, Q4_1, Q8_0 = (BLOCK_TYPES[name] for name in ("Q4_0", "Q4_1", "Q8_0"))


def block_type(bits: int, symmetric: bool) -> BlockType | None:
    """Return the block type of a grid; None for asymmetric INT8, which has no type."""
    if bits == 8:
        return Q8_0 if symmetric else None
    return Q4_0 if symmetric else Q4_1


def why_no_blocks(inputs: int, group_size: int) -> str | None:
    """Return why a row can't be split into blocks with one scale each; None if it can."""
    if inputs % BLOCK:
        return f"{inputs} inputs, which blocks of {BLOCK} do not divide"
    if group_size % BLOCK:
        return f"groups of {group_size}, which are not a multiple of blocks of {BLOCK}"
    return None


def to_blocks(quantized: QuantizedWeight[np.ndarray], kind: BlockType) -> np.ndarray:
    """Return the bytes of a tensor, uint8 ``[out, in / 32 * kind.bytes]``.

    :raises ValueError: if blocks do not divide a row, or an offset is not exact in float16.
    """
    rows, inputs = quantized.codes.shape
    split = quantized.in_groups(inputs // BLOCK)
    codes, scale, zero = split.codes, split.scale, split.zero_point
    if scale.shape[1] * BLOCK != inputs:
        raise ValueError(
            why_no_blocks(inputs, inputs // scale.shape[1]) or "groups that blocks do not divide"
        )
    floats = [scale.astype(np.float16)]
    if kind is Q4_1:
        exact = -scale.astype(np.float32) * zero
        floats.append(exact.astype(np.float16))
        if not np.array_equal(floats[1].astype(np.float32), exact):
            raise ValueError("scale * zero point is not exact in float16")
    inside = codes.reshape(-1, BLOCK)
    if kind.bits == 8:
        stored = inside ^ MIDDLE8  # offset binary (zero is 128) to two's complement
    else:
        stored = inside[:, : BLOCK // 2] | inside[:, BLOCK // 2 :] << 4
    numbers = np.stack(floats, axis=2).reshape(-1, kind.floats)
    return join_blocks(numbers, stored, 1, kind.bits).reshape(rows, -1)


def from_blocks(stored: np.ndarray, kind: BlockType) -> QuantizedWeight[np.ndarray]:
    """Return the quantized weight, in groups of 32, from the bytes of :func:`to_blocks`."""
    rows = stored.shape[0]
    numbers, codes = split_blocks(stored, kind.bits, kind.floats)
    floats = numbers.reshape(rows, -1, kind.floats)
    scale = floats[:, :, 0]
    if kind.bits == 8:
        codes = (codes ^ MIDDLE8).reshape(rows, -1)
        return from_arrays(codes, scale, np.full(scale.shape, MIDDLE8, np.uint8), kind.bits)
    halves = codes.reshape(-1, BLOCK // 2)
    codes = np.concatenate([halves & 15, halves >> 4], axis=1).reshape(rows, -1)
    if kind is Q4_0:
        middle = np.full(scale.shape, ZERO_CODE_4BIT, np.uint8)
        return from_arrays(codes, scale, middle, kind.bits)
    offset, step = floats[:, :, 1].astype(np.float32), scale.astype(np.float32)
    zero = np.rint(-offset / np.where(step == 0, 1, step))
    fits = (zero >= 0) & (zero < 16) & (-step * zero == offset)
    zero_point = np.where(fits, zero, NO_ZERO_POINT).astype(np.uint8)
    return from_arrays(codes, scale, zero_point, kind.bits)
