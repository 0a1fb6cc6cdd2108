"""Split ggml's quantization blocks into float16 numbers and codes, and join them again.

A block holds 32 codes of one row. Before the codes it has one float16 number, the scale, or two:
scale and offset. Where a quantization group spans several blocks, ggml repeats the numbers in each
block; a packed file stores them once.
"""

import numpy as np

BLOCK = 32  # codes
ZERO_CODE_4BIT = 8  # without an offset; signed 8-bit codes have 0


def block_bytes(bits: int, floats: int) -> int:
    """Return the bytes of one block with ``floats`` float16 numbers."""
    return 2 * floats + BLOCK * bits // 8


def split_blocks(dense: np.ndarray, bits: int, floats: int) -> tuple[np.ndarray, np.ndarray]:
    """Return float16 numbers ``[blocks, floats]`` and code bytes (uint8) of a tensor's bytes."""
    blocks = dense.reshape(-1, block_bytes(bits, floats))
    numbers = np.ascontiguousarray(blocks[:, : 2 * floats]).view(np.float16)
    return numbers, np.ascontiguousarray(blocks[:, 2 * floats :]).reshape(-1)


def join_blocks(numbers: np.ndarray, codes: np.ndarray, repeat: int, bits: int) -> np.ndarray:
    """Return the tensor's bytes (uint8 ``[bytes]``): the inverse of :func:`split_blocks`.

    :param repeat: number of consecutive blocks that share one row of ``numbers``.
    """
    floats = numbers.shape[1]
    dense = np.empty((len(numbers) * repeat, block_bytes(bits, floats)), np.uint8)
    dense[:, : 2 * floats] = np.repeat(numbers.view(np.uint8), repeat, axis=0)
    dense[:, 2 * floats :] = codes.reshape(len(dense), -1)
    return dense.reshape(-1)


def count_repeats(numbers: np.ndarray, row: int) -> int:
    """Return the largest number of consecutive blocks that share their numbers in all of a tensor.

    :param row: blocks per row of the tensor; the result divides it.
    """
    stored = np.ascontiguousarray(numbers).view(np.uint16)
    for count in range(row, 1, -1):
        if row % count == 0:
            groups = stored.reshape(-1, count, stored.shape[1])
            first = groups[
                : row // count
            ]  # a cheap first test: most counts already fail in one row
            if (first == first[:, :1]).all() and (groups == groups[:, :1]).all():
                return count
    return 1


def zero_codes(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Return the code that stands for zero (uint32).

    :return: one code for the whole tensor without offsets, else one per row of ``numbers``.
    """
    if numbers.shape[1] == 1:
        return np.array([ZERO_CODE_4BIT if bits == 4 else 0], np.uint32)
    scale, offset = numbers.astype(np.float32).T
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = np.nan_to_num(np.rint(-offset / scale), nan=0.0, posinf=0.0, neginf=0.0)
    return zero.clip(0, 2**bits - 1).astype(np.uint32)
