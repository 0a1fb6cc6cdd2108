"""Grids and quantized weights of torch tensors or numpy arrays; importing it needs no torch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", np.ndarray, "Tensor")
FLOAT16_BITS = 11  # significant bits of a float16
# Linear -> A float32 [rank, in] and B [out, rank]; B includes the adapter's scaling.
LowRank = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Grid(Generic[Array]):
    """Scales and zero points of one weight ``[out, in]``; ``numerics/affine.py`` has the formula.

    scale: float16 ``[out, groups]``, not zero; float32 of the same value where a file stores that.
        NNCF makes some negative: the largest weight of a symmetric group then gets the longer side
        of the range.
    zero_point: uint8 ``[out, groups]``, in [0, 2^bits - 1].
    bits: 2, 3, 4 or 8.
    group_size: consecutive input columns that share a scale; ``in`` means one group per row.
    """

    scale: Array
    zero_point: Array
    bits: int
    group_size: int

    @property
    def highest(self) -> int:
        """The highest code."""
        return 2**self.bits - 1

    @property
    def symmetric(self) -> bool:
        """True if every zero point is in the middle of the range."""
        return bool((self.zero_point == 2 ** (self.bits - 1)).all())

    def rows(self, rows: slice) -> "Grid[Array]":
        """Return the grid of some output rows."""
        return Grid(self.scale[rows], self.zero_point[rows], self.bits, self.group_size)

    def cpu(self: "Grid[Tensor]") -> "Grid[Tensor]":
        """Return the grid on the CPU."""
        return Grid(self.scale.cpu(), self.zero_point.cpu(), self.bits, self.group_size)


class QuantizedWeight(NamedTuple, Generic[Array]):
    """A quantized weight: the codes and their grid.

    codes: uint8 ``[out, in]``.
    """

    codes: Array
    grid: Grid[Array]

    @property
    def scale(self) -> Array:
        """The scales, ``[out, groups]``."""
        return self.grid.scale

    @property
    def zero_point(self) -> Array:
        """The zero points, uint8 ``[out, groups]``."""
        return self.grid.zero_point

    @property
    def bits(self) -> int:
        """Bits per code."""
        return self.grid.bits

    def rows(self, rows: slice) -> "QuantizedWeight[Array]":
        """Return some output rows."""
        return QuantizedWeight(self.codes[rows], self.grid.rows(rows))

    def numpy(self: "QuantizedWeight[Tensor]") -> "QuantizedWeight[np.ndarray]":
        """Return the weight as numpy arrays, which share the memory of the tensors."""
        scale, zero_point = self.scale.numpy(), self.zero_point.numpy()
        return from_arrays(self.codes.numpy(), scale, zero_point, self.bits)

    @property
    def steps(self: "QuantizedWeight[np.ndarray]") -> np.ndarray:
        """Codes minus zero points, int16 ``[out, in]``."""
        return codes_to_steps(self.codes, self.zero_point)

    def in_groups(
        self: "QuantizedWeight[np.ndarray]", groups: int
    ) -> "QuantizedWeight[np.ndarray]":
        """Repeat scales and zero points so that there are ``groups`` groups per row.

        Returns self if ``groups`` is not a multiple of the current number.
        """
        times, rest = divmod(groups, self.scale.shape[1])
        if times == 1 or rest:
            return self
        scale, zero_point = (np.repeat(a, times, axis=1) for a in (self.scale, self.zero_point))
        return from_arrays(self.codes, scale, zero_point, self.bits)

    def map_arrays(
        self: "QuantizedWeight[np.ndarray]", change: Callable[[np.ndarray], np.ndarray]
    ) -> "QuantizedWeight[np.ndarray]":
        """Return the weight with codes, scales and zero points changed by a function of rows."""
        scale, zero_point = change(self.scale), change(self.zero_point)
        return from_arrays(change(self.codes), scale, zero_point, self.bits)


def from_arrays(
    codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, bits: int
) -> QuantizedWeight[np.ndarray]:
    """Return the weight of codes ``[out, in]``, scales and zero points ``[out, groups]``.

    The last group of a row may be short.
    """
    group_size = -(-codes.shape[1] // scale.shape[1])
    return QuantizedWeight(codes, Grid(scale, zero_point, bits, group_size))


def join_rows(parts: Iterable[QuantizedWeight[np.ndarray]]) -> QuantizedWeight[np.ndarray]:
    """Concatenate the output rows of weights with the same bits and group size."""
    weights = list(parts)
    codes, scale, zero_point = (
        np.concatenate(arrays)
        for arrays in zip(*((w.codes, w.scale, w.zero_point) for w in weights), strict=True)
    )
    return from_arrays(codes, scale, zero_point, weights[0].bits)


def codes_to_steps(codes: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    """Return ``q - z``, int16 ``[out, in]``; 0 where the weight is zero.

    :param codes: uint8 ``[out, in]``.
    :param zero_point: uint8 ``[out, groups]``; the last group of a row may be short.
    """
    inputs, groups = codes.shape[1], zero_point.shape[1]
    zeros = np.repeat(zero_point, -(-inputs // groups), axis=1)[:, :inputs]
    return codes.astype(np.int16) - zeros


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple
