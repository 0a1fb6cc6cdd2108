"""Products by the plug-in inside the tests' small host, and a program that prints their digest.

The plug-in reads its settings once per process, so other settings need another process.
"""

import ctypes
import hashlib
import sys
from pathlib import Path

import numpy as np

Q4_0, Q4_1, Q8_0 = 2, 3, 8
BLOCK = 32


def load_host(host: Path, plugin: Path) -> ctypes.CDLL:
    """Load the plug-in into the small host."""
    library = ctypes.CDLL(str(host))
    library.ggml_backend_load.restype = ctypes.c_void_p
    assert library.ggml_backend_load(str(plugin).encode())
    return library


def make_blocks(kind: int, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Return the bytes of a GGUF tensor.

    codes: uint8 ``[rows, inputs]``. scale: float16 and zero: uint8, both ``[rows, blocks]``.
    """
    rows, inputs = codes.shape
    inside = codes.reshape(rows, inputs // BLOCK, BLOCK)
    parts = [scale[..., None].view(np.uint8)]
    if kind == Q4_1:
        minimum = (0 - scale.astype(np.float32) * zero).astype(np.float16)  # no -0
        parts.append(minimum[..., None].view(np.uint8))
    halves = inside[..., :16] | inside[..., 16:] << 4
    parts.append(inside ^ 128 if kind == Q8_0 else halves)
    return np.ascontiguousarray(np.concatenate(parts, axis=2)).reshape(-1)


def random_weight(
    kind: int, shape: tuple[int, int], zeros: str, repeats: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return blocks, and the float64 weight ``[rows, inputs]`` that they stand for.

    zeros: none, half, or pairs (at most 2 of 4 adjacent inputs are kept).
    repeats: adjacent blocks with one scale.
    """
    rng = np.random.default_rng(seed)
    rows, inputs = shape
    top = 256 if kind == Q8_0 else 16
    codes = rng.integers(0, top, shape, dtype=np.uint8)
    groups = -(-inputs // (BLOCK * repeats))
    # few bits, so that scale * zero point is exact in float16
    scale = (rng.integers(1, 64, (rows, groups)) / 1024).astype(np.float16)
    zero = np.full((rows, groups), top // 2, np.uint8)
    if kind == Q4_1:
        zero = rng.integers(0, 16, (rows, groups), dtype=np.uint8)
    scale, zero = (np.repeat(a, repeats, axis=1)[:, : inputs // BLOCK] for a in (scale, zero))
    wide = np.repeat(zero, BLOCK, axis=1)
    if zeros == "half":
        codes = np.where(rng.random(shape) < 0.5, wide, codes)
    if zeros == "pairs":
        dropped = np.argsort(rng.random((rows, inputs // 4, 4)), axis=2).reshape(shape) < 2
        codes = np.where(dropped, wide, codes)
    weight = (codes.astype(np.float64) - wide) * np.repeat(scale.astype(np.float64), BLOCK, axis=1)
    return make_blocks(kind, codes, scale, zero), weight


def multiply(
    host: ctypes.CDLL,
    kind: int,
    blocks: np.ndarray,
    x: np.ndarray,
    rows: int,
    threads: int = 2,
    parts: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the product ``[tokens, rows]``, and the bytes that the buffer gives back."""
    tokens, inputs = x.shape
    y, stored = np.full((tokens, rows), np.nan, np.float32), np.zeros_like(blocks)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (blocks, x, y, stored)]
    refused = host.host_multiply(
        *(kind, pointers[0], ctypes.c_int64(rows), ctypes.c_int64(inputs), pointers[1]),
        *(ctypes.c_int64(tokens), threads, parts, pointers[2], pointers[3]),
    )
    assert not refused
    return y, stored


def multiply_experts(
    host: ctypes.CDLL,
    kind: int,
    blocks: np.ndarray,
    shape: tuple[int, int, int],
    x: np.ndarray,
    ids: np.ndarray,
    threads: int = 2,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the products ``[tokens, used, rows]`` of every token with its experts, and the bytes.

    shape: experts, rows, inputs. ids: int32 ``[tokens, used]``.
    Returns None if the plug-in leaves the weight to the host.
    """
    (experts, rows, inputs), (tokens, used) = shape, ids.shape
    y, stored = np.full((tokens, used, rows), np.nan, np.float32), np.zeros_like(blocks)
    arrays = (blocks, ids, x, y, stored)
    blocks_at, ids_at, x_at, y_at, stored_at = (a.ctypes.data_as(ctypes.c_void_p) for a in arrays)
    sizes = [ctypes.c_int64(n) for n in (rows, inputs, experts, used, tokens)]
    refused = host.host_multiply_experts(
        *(kind, blocks_at, *sizes[:3], ids_at, sizes[3], x_at, sizes[4], threads, 1),
        *(y_at, stored_at),
    )
    return None if refused else (y, stored)


def main() -> None:
    """Multiply some matrices; print a digest of the results, and their relative RMS error."""
    host = load_host(Path(sys.argv[1]), Path(sys.argv[2]))
    digest, errors, values = hashlib.sha256(), 0.0, 0.0
    for seed, kind in enumerate((Q4_0, Q4_1, Q8_0)):
        for zeros in ("half", "pairs"):
            blocks, weight = random_weight(kind, (70, 256), zeros, 4, seed)
            for tokens in (1, 9):
                x = np.random.default_rng(seed).normal(size=(tokens, 256)).astype(np.float32)
                y, _ = multiply(host, kind, blocks, x, 70)
                digest.update(y.tobytes())
                exact = x.astype(np.float64) @ weight.T
                errors, values = (
                    errors + np.square(y - exact).sum(),
                    values + np.square(exact).sum(),
                )
    print(digest.hexdigest(), (errors / values) ** 0.5)


if __name__ == "__main__":
    main()
