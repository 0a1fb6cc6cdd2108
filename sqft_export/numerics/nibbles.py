"""Two 4-bit codes a byte, as both runtimes store them; numpy alone."""

import numpy as np


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 codes below 16, ``[..., n]``, two a byte, even position low: ``[..., ceil(n / 2)]``."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: np.ndarray, count: int) -> np.ndarray:
    """Inverse of :func:`pack_nibbles`: ``[..., count]``."""
    both = np.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape(*packed.shape[:-1], -1)[..., :count]
