"""The combinations of settings in a sweep, and their shards. Imports no torch."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sqft_export.errors import UserError
from sqft_export.recipe.load import load_recipe
from sqft_export.recipe.overrides import split_values
from sqft_export.recipe.schema import Recipe

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Sweep:
    """A recipe file, the settings that all combinations share, and the values of each axis."""

    recipe: Path
    overrides: tuple[str, ...]
    axes: tuple[tuple[str, ...], ...]
    model_path: Path | None

    @property
    def combinations(self) -> list[tuple[str, ...]]:
        """Every combination of the axes' settings, after the settings that all share."""
        return [(*self.overrides, *chosen) for chosen in itertools.product(*self.axes)]

    def load(self, settings: tuple[str, ...]) -> Recipe:
        """Return the recipe with the settings of one combination."""
        return load_recipe(self.recipe, settings, self.model_path)


def parse_axes(over: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the settings of each ``path=value,value``.

    :raises UserError: if an option does not have that form.
    """
    axes = []
    for setting in over:
        path, equals, values = setting.partition("=")
        found = split_values(values)
        if not equals or not all(found):
            raise UserError(f"--over {setting!r}: expected path=value,value")
        axes.append(tuple(f"{path}={value}" for value in found))
    return tuple(axes)


def shard_of(items: Sequence[_Item], shard: str) -> list[_Item]:
    """Return the items of a shard: ``3/8`` is every eighth item from the third on.

    :raises UserError: if the text does not have that form.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise UserError(
            f"--shard: found {shard!r}; expected <number>/<count>, such as 3/8; the number is 1 "
            "to <count>"
        )
    return list(items[number - 1 :: count])
