"""Sparsifiers, one file a method; the file name is the word in the recipe.

Each offers

    NEEDS       what it is given of the calibration inputs (``calibration.Inputs``)
    compress    ``(weight, rule, inputs) -> (weight, mask)``: float32 ``[out, in]`` with exact
                zeros, and the bool mask they follow
"""

import importlib
import math
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from sqft_export.numerics.masks import drop_lowest, drop_share, keep_n_of_m
from sqft_export.recipe import Override, Sparsify
from sqft_export.selection import matches


@dataclass(frozen=True)
class Rule:
    """How much of a Linear goes: a share of every row, or all but ``n`` of every ``m`` columns."""

    sparsity: float | None
    n_of_m: tuple[int, int] | None

    def mask(self, scores: Tensor) -> Tensor:
        """Mask that drops the lowest scores; bool ``[out, in]``, True = kept."""
        if self.n_of_m:
            return keep_n_of_m(scores, *self.n_of_m)
        assert self.sparsity is not None
        return drop_share(scores, self.sparsity)

    def mask_of_columns(self, scores: Tensor, start: int) -> Tensor:
        """The same for columns from ``start`` on alone, so that parts add up to the whole."""
        if self.n_of_m:
            return keep_n_of_m(scores, *self.n_of_m)
        assert self.sparsity is not None
        before, after = (
            math.floor(columns * self.sparsity + 1e-6)
            for columns in (start, start + scores.shape[1])
        )
        return drop_lowest(scores, after - before)


def override_for(config: Sparsify, name: str) -> Override | None:
    """The first override that names this Linear."""
    return next((o for o in config.overrides if matches(name, o.modules)), None)


def rule_for(config: Sparsify, name: str) -> Rule | None:
    """The rule of one Linear; None leaves it dense."""
    if override := override_for(config, name):
        return None if override.skip else Rule(override.sparsity, override.n_of_m())
    if config.method == "given":
        return GIVEN
    return Rule(config.sparsity, config.n_of_m())


GIVEN = Rule(None, None)  # the zeros that are there


def sparsifier(method: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{method}")
