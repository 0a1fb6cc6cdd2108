"""The quantization grid, the only one that quantize, adapt, merge, export and verify use.

    q = clamp(round(w / s) + z, 0, 2^bits - 1)        w_hat = s * (q - z)

``q`` is the code, ``s`` the scale and ``z`` the zero point. ``s`` is stored as float16, and used as
the float32 of the same value. ``z`` is an integer in the range of codes, so 0.0 is exactly on the
grid and the code of a pruned weight is ``z``. All arithmetic is float32, in this order of
operations, and rounds half to even. The codes in training are therefore the codes that are stored.
"""

import torch
from torch import Tensor

from sqft_export.numerics.codes import FLOAT16_BITS, Grid, QuantizedWeight

# A smaller scale is a subnormal float16: it loses bits, and runtimes may flush it to zero.
SMALLEST_SCALE = torch.finfo(torch.float16).tiny
# Fractions of a group's range that `fit_grid` tries. Clipping the largest weight often costs less
# than a coarser step for all other weights.
RANGE_FRACTIONS = tuple(1 - 0.04 * step for step in range(9))
ROWS_AT_ONCE = 1024  # temporary copies need more memory than a weight


def shift_scales(grid: Grid, shift: Tensor, scale_bits: int = FLOAT16_BITS) -> Grid:
    """Return a grid with its scales multiplied by ``exp(shift)`` and rounded to float16.

    All scales stay normal float16 numbers and keep their sign.

    :param shift: float32 ``[out, groups]``.
    :param scale_bits: significant bits of the scales.
    """
    scale = grid.scale.float() * shift.exp()
    # A float32 sign would promote the rounded scales to float32.
    scale = torch.copysign(_round_scale(scale.abs(), scale_bits), scale.half())
    return Grid(scale, grid.zero_point, grid.bits, grid.group_size)


def split_groups(weight: Tensor, group_size: int) -> Tensor:
    """Reshape ``[out, in]`` to ``[out, groups, group_size]``; ``group_size`` divides ``in``."""
    return weight.reshape(weight.shape[0], -1, group_size)


def _round_scale(scale: Tensor, bits: int) -> Tensor:
    """Round float32 scales to normal float16 numbers, then half to even to ``bits`` bits.

    :param bits: significant bits of the result, at most those of float16.
    """
    largest = torch.finfo(torch.float16).max
    half = scale.clamp_min(SMALLEST_SCALE).clamp_max(largest).to(torch.float16)
    if bits == FLOAT16_BITS:
        return half
    dropped = FLOAT16_BITS - bits
    pattern = half.view(torch.int16)
    nearest = pattern + (2 ** (dropped - 1) - 1) + (pattern >> dropped & 1)
    highest = int(torch.tensor(largest, dtype=torch.float16).view(torch.int16))
    return (nearest.clamp_max(highest) >> dropped << dropped).view(torch.float16)


def _candidate(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, fraction: float, scale_bits: int
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point for ``[low, high] * fraction``, symmetric if requested."""
    highest = 2**bits - 1
    width = 2 * torch.maximum(-low, high) if symmetric else high - low
    scale = _round_scale(width * fraction / highest, scale_bits)
    if symmetric:
        zero_point = torch.full_like(scale, 2 ** (bits - 1))
    else:
        zero_point = (-low * fraction / scale.float()).round().clamp(0, highest)
    return scale, zero_point.to(torch.uint8)


def fit_grid(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, scale_bits: int = FLOAT16_BITS
) -> Grid:
    """Return the grid with the least squared rounding error of each group.

    The candidates are ``RANGE_FRACTIONS`` of the group's range.

    :param weight: ``[out, in]``; ``group_size`` divides ``in``.
    :param scale_bits: significant bits of the scales.
    :return: the grid; a group of zeros gets the smallest scale.
    """
    weight = weight.float()
    groups = split_groups(weight, group_size)
    low = groups.amin(dim=2).clamp_max(0)
    high = groups.amax(dim=2).clamp_min(0)
    best_scale, best_zero_point = _candidate(
        low, high, bits, symmetric, RANGE_FRACTIONS[0], scale_bits
    )
    least = torch.full_like(low, torch.inf)
    for fraction in RANGE_FRACTIONS:
        scale, zero_point = _candidate(low, high, bits, symmetric, fraction, scale_bits)
        grid = Grid(scale, zero_point, bits, group_size)
        rounded = split_groups(fake_quantize(weight, grid), group_size)
        error = rounded.sub_(groups).square_().sum(dim=2)
        better = error < least
        least = torch.where(better, error, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
    return Grid(best_scale, best_zero_point, bits, group_size)


def row_grid(weight: Tensor, bits: int | None, symmetric: bool) -> Grid | None:
    """Return the grid of an embedding or head, one scale per row; None if it stays in floats.

    :param weight: ``[out, in]``; a vector stays in floats.
    :param bits: None: the matrix stays in floats.
    """
    if bits is None or weight.dim() != 2:
        return None
    return fit_grid(weight.float(), bits, weight.shape[1], symmetric)


def table_grid(weight: Tensor, columns: int) -> Grid:
    """Return the symmetric INT8 grid of a token table, fitted in chunks of rows to save memory.

    :param weight: ``[tokens, width]``.
    :param columns: columns that share a scale.
    """
    chunks = [fit_grid(part, 8, columns, True) for part in weight.split(ROWS_AT_ONCE)]
    scale, zero_point = (
        torch.cat([getattr(grid, name) for grid in chunks]) for name in ("scale", "zero_point")
    )
    return Grid(scale, zero_point, 8, columns)


def _steps(weight: Tensor, grid: Grid) -> Tensor:
    """Return ``round(w / s)``, float32 ``[out, groups, group_size]``, in new memory.

    Callers change it in place: allocating a large result takes longer than computing it.
    """
    groups = split_groups(weight.float(), grid.group_size)
    return (groups / grid.scale.float().unsqueeze(2)).round_()


def _limits(grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest ``q - z`` of every group, float32 ``[out, groups, 1]``."""
    low = -grid.zero_point.float().unsqueeze(2)
    return low, grid.highest + low


def quantize(weight: Tensor, grid: Grid) -> Tensor:
    """Return the codes of a float weight ``[out, in]``: uint8 ``[out, in]``."""
    codes = _steps(weight, grid).add_(grid.zero_point.float().unsqueeze(2))
    return codes.clamp_(0, grid.highest).to(torch.uint8).reshape(weight.shape)


def quantize_rows(weight: Tensor, grid: Grid) -> Tensor:
    """Return :func:`quantize` of a large matrix, computed in chunks of rows to save memory."""
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        codes[rows] = quantize(weight[rows], grid.rows(rows))
    return codes


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """Return ``s * (q - z)``, float32 ``[out, in]``, of codes uint8 ``[out, in]``."""
    steps = split_groups(codes.float(), grid.group_size).sub_(grid.zero_point.float().unsqueeze(2))
    return steps.mul_(grid.scale.float().unsqueeze(2)).reshape(codes.shape)


def widen_to_4_bits(weight: QuantizedWeight) -> QuantizedWeight:
    """Return 2- and 3-bit codes as 4-bit codes; codes of at least 4 bits are unchanged.

    Files have at least 4 bits, because every runtime and kernel reads those. The dequantized weight
    does not change. A symmetric grid stays symmetric.
    """
    codes, grid = weight
    if grid.bits >= 4:
        return weight
    shift = 8 - 2 ** (grid.bits - 1) if grid.symmetric else 0
    wide = Grid(grid.scale, grid.zero_point + shift, 4, grid.group_size)
    return QuantizedWeight(codes + shift, wide)


def replace_zero_scales(weight: QuantizedWeight) -> QuantizedWeight:
    """Replace scales of zero, which other tools write, by the smallest scale.

    All weights of such a group are zero. They stay zero: their codes become the zero point.

    :raises ValueError: if scales are NaN or infinite in float16.
    """
    codes, grid = weight
    if count := int((~torch.isfinite(grid.scale)).sum()):
        raise ValueError(f"{count} of {grid.scale.numel()} scales are NaN or infinite in float16")
    empty = grid.scale == 0
    if not empty.any():
        return weight
    scale = grid.scale.masked_fill(empty, SMALLEST_SCALE)
    groups = split_groups(codes, grid.group_size)
    new_codes = groups.where(~empty[:, :, None], grid.zero_point[:, :, None])
    filled = Grid(scale, grid.zero_point, grid.bits, grid.group_size)
    return QuantizedWeight(new_codes.reshape(codes.shape), filled)


def fake_quantize(weight: Tensor, grid: Grid) -> Tensor:
    """Return the nearest grid point of every weight, float32 ``[out, in]``.

    Equal to ``dequantize(quantize(weight, grid), grid)``, but without integers.
    """
    nearest = _steps(weight, grid).clamp_(*_limits(grid))
    return nearest.mul_(grid.scale.float().unsqueeze(2)).reshape(weight.shape)


def fake_quantize_rows(weight: Tensor, grid: Grid) -> Tensor:
    """Return :func:`fake_quantize` of a large matrix, computed in chunks of rows to save memory."""
    nearest = torch.empty(weight.shape)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        nearest[rows] = fake_quantize(weight[rows], grid.rows(rows))
    return nearest


def fake_quantize_inside(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return :func:`fake_quantize` and a bool ``[out, in]``, True where the code is not clamped.

    The straight-through gradient passes only where it is True.
    """
    steps = _steps(weight, grid)
    nearest = steps.clamp(*_limits(grid))
    inside = (steps == nearest).reshape(weight.shape)
    return nearest.mul_(grid.scale.float().unsqueeze(2)).reshape(weight.shape), inside
