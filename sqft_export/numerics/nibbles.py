"""Two 4-bit codes a byte, as both runtimes store them; numpy alone."""

import numpy as np


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 codes below 16, ``[..., n]``, two a byte, even position low: ``[..., ceil(n / 2)]``."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    pairs = np.ascontiguousarray(codes).view("<u2")  # two codes at once, a strided byte is slow
    return (pairs | pairs >> 4).astype(np.uint8)


def unpack_nibbles(packed: np.ndarray, count: int) -> np.ndarray:
    """Inverse of :func:`pack_nibbles`: ``[..., count]``."""
    pairs = packed.astype("<u2", order="C")
    pairs |= pairs << 4
    pairs &= 0x0F0F
    return pairs.view(np.uint8)[..., :count]
