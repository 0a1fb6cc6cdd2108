"""ggml's blocks apart: the float16 numbers before the codes, and the codes.

A block holds 32 codes of a row behind one number, its scale, or two, scale and offset. A grid with
longer groups says them again in each block; here they are kept once.
"""

import numpy as np

BLOCK = 32  # codes
MIDDLE4 = 8  # the code of zero where there is no offset; of 8 bits it is 0, signed


def block_bytes(bits: int, floats: int) -> int:
    return 2 * floats + BLOCK * bits // 8


def apart(dense: np.ndarray, bits: int, floats: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of a tensor -> float16 ``[blocks, floats]`` and codes, uint8, as they lie there."""
    blocks = dense.reshape(-1, block_bytes(bits, floats))
    numbers = np.ascontiguousarray(blocks[:, : 2 * floats]).view(np.float16)
    return numbers, np.ascontiguousarray(blocks[:, 2 * floats :]).reshape(-1)


def joined(numbers: np.ndarray, codes: np.ndarray, repeat: int, bits: int) -> np.ndarray:
    """The inverse, of numbers that each stand for so many blocks: uint8 ``[bytes]``."""
    floats = numbers.shape[1]
    dense = np.empty((len(numbers) * repeat, block_bytes(bits, floats)), np.uint8)
    dense[:, : 2 * floats] = np.repeat(numbers.view(np.uint8), repeat, axis=0)
    dense[:, 2 * floats :] = codes.reshape(len(dense), -1)
    return dense.reshape(-1)


def repeats(numbers: np.ndarray, row: int) -> int:
    """How many blocks in a row have the same numbers, everywhere.

    :param row: blocks of a row of the tensor.
    """
    stored = np.ascontiguousarray(numbers).view(np.uint16)
    for count in range(row, 1, -1):
        if row % count == 0:
            groups = stored.reshape(-1, count, stored.shape[1])
            first = groups[: row // count]  # of one row, which most counts fail in
            if (first == first[:, :1]).all() and (groups == groups[:, :1]).all():
                return count
    return 1


def zero_codes(numbers: np.ndarray, bits: int) -> np.ndarray:
    """The code that is most likely zero, uint32: one of all, or one for each row of numbers."""
    if numbers.shape[1] == 1:
        return np.array([MIDDLE4 if bits == 4 else 0], np.uint32)
    scale, offset = numbers.astype(np.float32).T
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = np.nan_to_num(np.rint(-offset / scale), nan=0.0, posinf=0.0, neginf=0.0)
    return zero.clip(0, 2**bits - 1).astype(np.uint32)
