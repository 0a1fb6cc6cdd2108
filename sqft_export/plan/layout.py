"""Shapes of the base model, read from file headers or from the recipe."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import cast

from sqft_export.errors import UserError
from sqft_export.model.architecture import family_of, shapes_of
from sqft_export.model.checkpoint import Checkpoint, count_blocks, decoder_linears
from sqft_export.model.config import ModelConfig
from sqft_export.model.families import Family
from sqft_export.model.hub import HUB_ADVICE
from sqft_export.model.wrappers import text_config_of
from sqft_export.numerics.groups import fallback_group_size
from sqft_export.recipe.schema import Recipe


def described_config(recipe: Recipe) -> ModelConfig | None:
    """Return the recipe's ``model.config``, of a multimodal model that of its text model."""
    if recipe.model.config is None:
        return None
    return text_config_of(cast(ModelConfig, recipe.model.config), f"{recipe.file}: model.config")


def weight_shapes(recipe: Recipe, folder: Path | None) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight, from the files or from the recipe's ``model.config``.

    :raises UserError: if the model is not on this machine and the recipe does not describe it, or
        if the folder's config differs from the recipe's.
    """
    expected = described_config(recipe)
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
    """Return the bytes of one weight in the base checkpoint: those of its largest tensor."""
    if folder is None:
        return 4 if (described_config(recipe) or {}).get("dtype") == "float32" else 2
    headers = Checkpoint(folder).headers.values()
    largest = max(headers, key=lambda header: header.bytes)
    return largest.bytes // prod(largest.shape)


@dataclass(frozen=True)
class Layout:
    """Shapes of the base model.

    family: model family.
    linears: decoder Linear -> (outputs, inputs).
    embedding: (vocabulary, width) of the embedding; the output head has the same shape.
    others: number of weights outside the decoder Linears.
    width: bytes of one weight in the checkpoint.
    config: contents of ``config.json``.
    folder: folder of the model; None if it is only on the hub.
    tables: number of weights of token tables besides the embedding, which are part of ``others``.
    """

    family: Family
    linears: dict[str, tuple[int, int]]
    embedding: tuple[int, int]
    others: int
    width: int
    config: ModelConfig
    folder: Path | None
    tables: int = 0

    @property
    def weights(self) -> int:
        """Return the number of weights of all decoder Linears."""
        return sum(prod(shape) for shape in self.linears.values())

    @property
    def blocks(self) -> int:
        """Return the number of decoder blocks."""
        return count_blocks(self.linears, self.family.blocks)

    @property
    def head(self) -> int:
        """Return the number of weights of the output head."""
        return prod(self.embedding)

    @property
    def last_names(self) -> list[str]:
        """Return the names of decoder Linears within a block, such as ``down_proj``."""
        return sorted({name.rsplit(".", 1)[1] for name in self.linears})


def layout_of(recipe: Recipe, folder: Path | None) -> Layout:
    """Return the layout of the base model.

    :raises UserError: see :func:`weight_shapes`.
    """
    shapes = weight_shapes(recipe, folder)
    described = described_config(recipe) or ModelConfig()
    config = described if folder is None else Checkpoint(folder).config
    family = family_of(config, str(recipe.file))
    linears = decoder_linears(shapes, family)
    total = sum(prod(shape) for shape in shapes.values())
    weights = sum(prod(shape) for shape in linears.values())
    vocabulary, width = shapes[f"{family.embedding}.weight"]
    stored = weight_bytes(recipe, folder)
    tables = sum(prod(shapes.get(f"{name}.weight", (0,))) for name in family.tables)
    embedding, others = (vocabulary, width), total - weights
    return Layout(family, linears, embedding, others, stored, config, folder, tables)


def group_sizes(recipe: Recipe, layout: Layout) -> dict[str, int]:
    """Return the group size that each Linear gets."""
    requested = recipe.quantize.group_size
    return {
        name: fallback_group_size(inputs, requested) for name, (_, inputs) in layout.linears.items()
    }


def fallback_sizes(recipe: Recipe, layout: Layout) -> dict[str, int]:
    """Return the group sizes of Linears that do not get the requested one."""
    requested = recipe.quantize.group_size
    if recipe.quantize.method == "none" or requested is None:
        return {}
    return {name: size for name, size in group_sizes(recipe, layout).items() if size != requested}
