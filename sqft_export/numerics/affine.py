"""The quantization grid, used alike by quantize, adapt, merge, export and verify.

    q = clamp(round(w / s) + z, 0, 2^bits - 1)        w_hat = s * (q - z)

``s`` is stored as float16 and always used as the float32 of that float16; ``z`` is an integer
inside the range, so 0.0 is on the grid exactly and a pruned weight is the code ``z``. All
arithmetic is float32 and rounding is half to even, in this one order of operations: codes seen
in training are the codes that are stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sqft_export.numerics.codes import FLOAT16_BITS

# A scale below the smallest normal float16 would lose bits, or be flushed to zero by a runtime.
SMALLEST_SCALE = torch.finfo(torch.float16).tiny
# Fractions of the full range tried by `fit_grid`; clipping the rarest weight often costs less
# than a coarser step for all the others.
SHRINK = tuple(1 - 0.04 * step for step in range(9))


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of one weight ``[out, in]``.

    scale: float16 ``[out, groups]``, not zero; negative where NNCF gives the largest weight of a
        symmetric group the longer side of the range.
    zero_point: uint8 ``[out, groups]``, in [0, 2^bits - 1].
    bits: 2, 3, 4 or 8.
    group_size: consecutive input columns that share a scale; ``in`` for one group per row.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int
    group_size: int

    @property
    def highest(self) -> int:
        return 2**self.bits - 1

    @property
    def symmetric(self) -> bool:
        return bool((self.zero_point == 2 ** (self.bits - 1)).all())

    def cpu(self) -> "Grid":
        return Grid(self.scale.cpu(), self.zero_point.cpu(), self.bits, self.group_size)

    def moved(self, shift: Tensor, scale_bits: int = FLOAT16_BITS) -> "Grid":
        """Its scales times ``exp(shift)`` (float32 ``[out, groups]``), rounded as they are stored.

        No scale leaves the range of normal float16 numbers, and none changes its sign.
        """
        scale = self.scale.float() * shift.exp()
        scale = torch.copysign(_stored_scale(scale.abs(), scale_bits), scale)
        return Grid(scale, self.zero_point, self.bits, self.group_size)

    def rows(self, rows: slice) -> "Grid":
        return Grid(self.scale[rows], self.zero_point[rows], self.bits, self.group_size)


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """``[out, in]`` seen as ``[out, groups, group_size]``; ``group_size`` divides ``in``."""
    return weight.reshape(weight.shape[0], -1, group_size)


def _stored_scale(scale: Tensor, bits: int) -> Tensor:
    """Positive float32 scales as files hold them: normal float16 numbers of so many significant
    bits, rounded half to even."""
    largest = torch.finfo(torch.float16).max
    half = scale.clamp_min(SMALLEST_SCALE).clamp_max(largest).to(torch.float16)
    if bits == FLOAT16_BITS:
        return half
    cut = FLOAT16_BITS - bits
    pattern = half.view(torch.int16)
    nearest = pattern + (2 ** (cut - 1) - 1) + (pattern >> cut & 1)
    most = int(torch.tensor(largest, dtype=torch.float16).view(torch.int16))
    return (nearest.clamp_max(most) >> cut << cut).view(torch.float16)


def _candidate(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, shrink: float, scale_bits: int
) -> tuple[Tensor, Tensor]:
    """float16 scale and uint8 zero point for the range ``[low, high] * shrink``."""
    highest = 2**bits - 1
    width = 2 * torch.maximum(-low, high) if symmetric else high - low
    scale = _stored_scale(width * shrink / highest, scale_bits)
    if symmetric:
        zero_point = torch.full_like(scale, 2 ** (bits - 1))
    else:
        zero_point = (-low * shrink / scale.float()).round().clamp(0, highest)
    return scale, zero_point.to(torch.uint8)


def fit_grid(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, scale_bits: int = FLOAT16_BITS
) -> Grid:
    """Grid of least squared rounding error among a few fractions of each group's range.

    :param weight: ``[out, in]``; ``group_size`` divides ``in``.
    :param scale_bits: significant bits of the scales.
    :return: :class:`Grid`; a group of zeros gets the smallest scale.
    """
    weight = weight.float()
    groups = grouped(weight, group_size)
    low = groups.amin(dim=2).clamp_max(0)
    high = groups.amax(dim=2).clamp_min(0)
    best_scale, best_zero_point = _candidate(low, high, bits, symmetric, SHRINK[0], scale_bits)
    least = torch.full_like(low, torch.inf)
    for shrink in SHRINK:
        scale, zero_point = _candidate(low, high, bits, symmetric, shrink, scale_bits)
        grid = Grid(scale, zero_point, bits, group_size)
        rounded = grouped(fake_quantize(weight, grid), group_size)
        error = rounded.sub_(groups).square_().sum(dim=2)
        better = error < least
        least = torch.where(better, error, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
    return Grid(best_scale, best_zero_point, bits, group_size)


def _steps(weight: Tensor, grid: Grid) -> Tensor:
    """``round(w / s)``, float32 ``[out, groups, group_size]``, its own memory.

    What follows works in place: a large result costs more to place in memory than to compute.
    """
    return (grouped(weight.float(), grid.group_size) / grid.scale.float().unsqueeze(2)).round_()


def _limits(grid: Grid) -> tuple[Tensor, Tensor]:
    """The lowest and the highest step of every group, float32 ``[out, groups, 1]``."""
    low = -grid.zero_point.float().unsqueeze(2)
    return low, grid.highest + low


def quantize(weight: Tensor, grid: Grid) -> Tensor:
    """Codes uint8 ``[out, in]`` of a float ``weight [out, in]``."""
    codes = _steps(weight, grid).add_(grid.zero_point.float().unsqueeze(2))
    return codes.clamp_(0, grid.highest).to(torch.uint8).reshape(weight.shape)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """float32 ``[out, in]``: ``s * (q - z)``, of codes uint8 ``[out, in]``."""
    steps = grouped(codes.float(), grid.group_size).sub_(grid.zero_point.float().unsqueeze(2))
    return steps.mul_(grid.scale.float().unsqueeze(2)).reshape(codes.shape)


def stored(codes: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """Codes and grid as files hold them: those of fewer than 4 bits among the 4-bit ones, which
    every runtime and kernel reads. No value changes; a symmetric grid keeps its zero in the middle.

    :param codes: uint8 ``[out, in]``.
    """
    if grid.bits >= 4:
        return codes, grid
    shift = 8 - 2 ** (grid.bits - 1) if grid.symmetric else 0
    return codes + shift, Grid(grid.scale, grid.zero_point + shift, 4, grid.group_size)


def settled(codes: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """Codes and grid that another tool made, with no scale that is zero: such a group is all zeros,
    now at the smallest scale. No value changes.

    :param codes: uint8 ``[out, in]``.
    :raises ValueError: if scales are NaN or infinite as float16.
    """
    if count := int((~torch.isfinite(grid.scale)).sum()):
        raise ValueError(f"{count} of {grid.scale.numel()} scales are NaN or infinite in float16")
    empty = grid.scale == 0
    if not empty.any():
        return codes, grid
    scale = grid.scale.masked_fill(empty, SMALLEST_SCALE)
    held = grouped(codes, grid.group_size).where(~empty[:, :, None], grid.zero_point[:, :, None])
    return held.reshape(codes.shape), Grid(scale, grid.zero_point, grid.bits, grid.group_size)


def fake_quantize(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest grid point of every weight: float32 ``[out, in]``.

    Equal to ``dequantize(quantize(weight, grid), grid)``, without the way over integers.
    """
    nearest = _steps(weight, grid).clamp_(*_limits(grid))
    return nearest.mul_(grid.scale.float().unsqueeze(2)).reshape(weight.shape)


def fake_quantize_inside(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The same, and bool ``[out, in]``: where the code is not clamped, so that a straight-through
    gradient passes."""
    steps = _steps(weight, grid)
    nearest = steps.clamp(*_limits(grid))
    inside = (steps == nearest).reshape(weight.shape)
    return nearest.mul_(grid.scale.float().unsqueeze(2)).reshape(weight.shape), inside
