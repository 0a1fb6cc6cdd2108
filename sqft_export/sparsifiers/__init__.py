"""Sparsifiers, one file a method; the file name is the word in the recipe."""

import importlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor

from sqft_export.numerics.masks import drop_lowest, drop_share, keep_at_most, keep_n_of_m
from sqft_export.recipe.schema import Override, Sparsify, matches


@dataclass(frozen=True)
class Pruning:
    """How much of a Linear goes: a share of every row, or all but ``n`` of every ``m`` columns.

    at_most: of a share: no more than the first of every so many columns are kept.
    """

    sparsity: float | None
    n_of_m: tuple[int, int] | None
    at_most: tuple[int, int] | None = None

    @property
    def block(self) -> int:
        """Columns that are chosen in one piece."""
        together = self.n_of_m or self.at_most
        return together[1] if together else 1

    def mask(self, scores: Tensor) -> Tensor:
        """Mask that drops the lowest scores; bool ``[out, in]``, True = kept."""
        if self.n_of_m:
            return keep_n_of_m(scores, *self.n_of_m)
        assert self.sparsity is not None
        return drop_share(self._bounded(scores), self.sparsity)

    def _bounded(self, scores: Tensor) -> Tensor:
        return keep_at_most(scores, *self.at_most) if self.at_most else scores

    def mask_of_columns(self, scores: Tensor, start: int) -> Tensor:
        """The same for columns from ``start`` on alone, so that parts add up to the whole."""
        if self.n_of_m:
            return keep_n_of_m(scores, *self.n_of_m)
        assert self.sparsity is not None
        before, after = (
            math.floor(columns * self.sparsity + 1e-6)
            for columns in (start, start + scores.shape[1])
        )
        return drop_lowest(self._bounded(scores), after - before)


EXISTING_ZEROS = Pruning(None, None)  # the zeros that are there


def override_for(config: Sparsify, name: str) -> Override | None:
    """The first override that names this Linear."""
    return next((o for o in config.overrides if matches(name, o.modules)), None)


def pruning_of(config: Sparsify, name: str) -> Pruning | None:
    """The pruning of one Linear; None leaves it dense."""
    if override := override_for(config, name):
        if override.skip:
            return None
        return Pruning(override.sparsity, override.n_of_m(), override.at_most)
    if config.method == "given":
        return EXISTING_ZEROS
    return Pruning(config.sparsity, config.n_of_m(), config.at_most)


class Sparsifier(Protocol):
    """NEEDS: what it is given of the calibration inputs; see ``model.blocks.Inputs``."""

    NEEDS: str

    def compress(self, weight: Tensor, pruning: Pruning, inputs: Any, /) -> tuple[Tensor, Tensor]:
        """Float32 ``[out, in]`` with exact zeros, and the bool mask they follow, True = kept."""


def sparsifier(method: str) -> Sparsifier:
    return cast(Sparsifier, importlib.import_module(f"{__name__}.{method}"))


if TYPE_CHECKING:  # mypy holds every module to the protocol
    from sqft_export.sparsifiers import given, magnitude, sparsegpt, wanda

    _SPARSIFIERS: tuple[Sparsifier, ...] = (given, magnitude, sparsegpt, wanda)
