"""Pack two 4-bit codes per byte, in the layout of OpenVINO and ONNX Runtime; needs only numpy."""

import numpy as np


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Pack uint8 codes below 16, ``[..., n]``, into uint8 ``[..., ceil(n / 2)]``.

    Codes at even positions are in the low 4 bits. A zero pads an odd number of codes.
    """
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    pairs = np.ascontiguousarray(codes).view("<u2")  # reading single bytes with a stride is slow
    return (pairs | pairs >> 4).astype(np.uint8)


def unpack_nibbles(packed: np.ndarray, count: int) -> np.ndarray:
    """Invert :func:`pack_nibbles`; return ``[..., count]``."""
    pairs = packed.astype("<u2", order="C")
    pairs |= pairs << 4
    pairs &= 0x0F0F
    return pairs.view(np.uint8)[..., :count]
