"""Sparsifiers, one module per method; its name is the value of ``sparsify.method``."""

import importlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

from sqft_export.numerics.masks import drop_lowest, drop_share, keep_at_most, keep_n_of_m
from sqft_export.recipe.schema import Override, Sparsify, matches


@dataclass(frozen=True)
class Pruning:
    """The sparsity of one Linear, as a share or as an N:M pattern.

    sparsity: share of every row that is dropped; None for an N:M pattern.
    n_of_m: ``(n, m)``: ``n`` of every ``m`` consecutive columns are kept; None for a share.
    at_most: ``(n, m)``: a limit for a share. At most ``n`` of every ``m`` consecutive columns are
        kept.
    """

    sparsity: float | None
    n_of_m: tuple[int, int] | None
    at_most: tuple[int, int] | None = None

    @property
    def block(self) -> int:
        """Number of consecutive columns whose mask is chosen at once."""
        pattern = self.n_of_m or self.at_most
        return pattern[1] if pattern else 1

    def mask(self, scores: Tensor) -> Tensor:
        """Return the mask that drops the lowest scores: bool ``[out, in]``, True = kept."""
        if self.n_of_m:
            return keep_n_of_m(scores, *self.n_of_m)
        assert self.sparsity is not None
        return drop_share(self._limit_kept(scores), self.sparsity)

    def _limit_kept(self, scores: Tensor) -> Tensor:
        """Lower the scores of columns that ``at_most`` drops."""
        return keep_at_most(scores, *self.at_most) if self.at_most else scores

    def mask_of_columns(self, scores: Tensor, start: int) -> Tensor:
        """Return the mask of the columns from ``start`` on.

        The masks of consecutive parts drop as many weights per row as :meth:`mask` does.

        :param scores: ``[out, columns]`` of these columns only.
        """
        if self.n_of_m:
            return keep_n_of_m(scores, *self.n_of_m)
        assert self.sparsity is not None
        before, after = (
            math.floor(columns * self.sparsity + 1e-6)
            for columns in (start, start + scores.shape[1])
        )
        return drop_lowest(self._limit_kept(scores), after - before)


EXISTING_ZEROS = Pruning(None, None)  # keeps the zeros of the checkpoint and drops nothing


def override_for(config: Sparsify, name: str) -> Override | None:
    """Return the first override that matches this Linear, or None."""
    return next((o for o in config.overrides if matches(name, o.modules)), None)


def pruning_of(config: Sparsify, name: str) -> Pruning | None:
    """Return the pruning of one Linear; None leaves it dense."""
    if override := override_for(config, name):
        if override.skip:
            return None
        return Pruning(override.sparsity, override.n_of_m(), override.at_most)
    if config.method == "existing":
        return EXISTING_ZEROS
    return Pruning(config.sparsity, config.n_of_m(), config.at_most)


class Sparsifier(Protocol):
    """The interface of a sparsifier.

    NEEDS: the statistic of the calibration inputs that it needs; see ``model.blocks.Inputs``.
    """

    NEEDS: str

    def compress(
        self, weight: Tensor, pruning: Pruning, inputs: Tensor | None, /
    ) -> tuple[Tensor, Tensor]:
        """Return the pruned weight and its mask.

        :param weight: float32 ``[out, in]``.
        :return: float32 ``[out, in]`` with exact zeros; and bool ``[out, in]``, True = kept.
        """


def sparsifier(method: str) -> Sparsifier:
    """Return the module of a method."""
    return cast(Sparsifier, importlib.import_module(f"{__name__}.{method}"))


if TYPE_CHECKING:  # mypy checks every module against the protocol
    from sqft_export.sparsifiers import existing, magnitude, sparsegpt, wanda

    _SPARSIFIERS: tuple[Sparsifier, ...] = (existing, magnitude, sparsegpt, wanda)
