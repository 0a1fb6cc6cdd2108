"""Quantized weights in numpy, for devices without torch."""

from typing import NamedTuple

import numpy as np

FLOAT16_BITS = 11  # significant bits of a float16


class Quantized(NamedTuple):
    """A quantized weight as a file holds it.

    codes: uint8 ``[out, in]``.
    scale: float16, or float32 of the same value, ``[out, groups]``.
    zero_point: uint8 ``[out, groups]``.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray

    def in_groups(self, groups: int) -> "Quantized":
        """Repeat scales and zero points so that there are ``groups`` groups per row.

        Returns self if ``groups`` is not a multiple of the current number.
        """
        times, rest = divmod(groups, self.scale.shape[1])
        if times == 1 or rest:
            return self
        scale, zero_point = (np.repeat(a, times, axis=1) for a in (self.scale, self.zero_point))
        return Quantized(self.codes, scale, zero_point)

    @property
    def steps(self) -> np.ndarray:
        """Codes minus zero points, int16 ``[out, in]``."""
        return codes_to_steps(self.codes, self.zero_point)


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
