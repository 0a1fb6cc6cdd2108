"""Shapes of the base model, from headers alone, as a recipe sees them."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sqft_export.errors import UserError
from sqft_export.model.architecture import family_of, shapes_of
from sqft_export.model.checkpoint import Checkpoint, count_blocks, decoder_linears
from sqft_export.model.families import Family
from sqft_export.model.hub import HUB_ADVICE
from sqft_export.numerics.groups import fallback_group_size
from sqft_export.recipe.schema import Recipe


def weight_shapes(recipe: Recipe, folder: Path | None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight: from the files, or from the recipe's ``model.config``.

    :raises UserError: if the model is on the hub alone and the recipe does not describe it, or
        if the folder's config is not what the recipe expects.
    """
    expected = recipe.model.config
    if folder is None:
        if expected is None:
            raise UserError(
                f"{recipe.file}: model.hub: {recipe.model.hub} is not on this machine and "
                f"model.config does not describe it; {HUB_ADVICE}"
            )
        return shapes_of(expected, f"{recipe.file}: model.config")
    checkpoint = Checkpoint(folder)
    checkpoint.check()
    for field, value in (expected or {}).items():
        if checkpoint.config.get(field) != value:
            raise UserError(
                f"{recipe.file}: model.config.{field}: the recipe expects {value!r}, "
                f"{folder / 'config.json'} has {checkpoint.config.get(field)!r}"
            )
    return checkpoint.shapes


def weight_bytes(recipe: Recipe, folder: Path | None) -> int:
    """Bytes of one weight as the base checkpoint stores it."""
    if folder is None:
        return 4 if (recipe.model.config or {}).get("dtype") == "float32" else 2
    headers = Checkpoint(folder).headers.values()
    largest = max(headers, key=lambda header: header.bytes)
    return largest.bytes // prod(largest.shape)


@dataclass(frozen=True)
class Layout:
    """Shapes of the base model, as the recipe sees them.

    family: of the model.
    linears: decoder Linear -> (outputs, inputs).
    embedding: (vocabulary, width) of the embedding, which the head's is too.
    others: count of all weights outside them.
    width: bytes of one stored weight.
    config: of the model, as ``config.json`` has it.
    folder: of the model; None where it is on the hub alone.
    """

    family: Family
    linears: dict[str, tuple[int, int]]
    embedding: tuple[int, int]
    others: int
    width: int
    config: dict[str, Any]
    folder: Path | None

    @property
    def weights(self) -> int:
        return sum(prod(shape) for shape in self.linears.values())

    @property
    def blocks(self) -> int:
        return count_blocks(self.linears, self.family.blocks)

    @property
    def head(self) -> int:
        """Weights that the last hidden state is multiplied with."""
        return prod(self.embedding)

    @property
    def last_names(self) -> list[str]:
        """What decoder Linears are called in their blocks."""
        return sorted({name.rsplit(".", 1)[1] for name in self.linears})


def layout_of(recipe: Recipe, folder: Path | None) -> Layout:
    shapes = weight_shapes(recipe, folder)
    config = (recipe.model.config if folder is None else Checkpoint(folder).config) or {}
    family = family_of(config, str(recipe.file))
    linears = decoder_linears(shapes, family.blocks)
    total = sum(prod(shape) for shape in shapes.values())
    weights = sum(prod(shape) for shape in linears.values())
    vocabulary, width = shapes[f"{family.embedding}.weight"]
    stored = weight_bytes(recipe, folder)
    return Layout(family, linears, (vocabulary, width), total - weights, stored, config, folder)


def group_sizes(recipe: Recipe, layout: Layout) -> dict[str, int]:
    """The group size every Linear really gets."""
    asked = recipe.quantize.group_size
    return {
        name: fallback_group_size(inputs, asked) for name, (_, inputs) in layout.linears.items()
    }


def fallbacks(recipe: Recipe, layout: Layout) -> dict[str, int]:
    """Linears whose group size is not the one asked for, and the one they get."""
    asked = recipe.quantize.group_size
    if recipe.quantize.method == "none" or asked is None:
        return {}
    return {name: size for name, size in group_sizes(recipe, layout).items() if size != asked}
