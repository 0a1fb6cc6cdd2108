"""The recipe sections in a pass's signature are those of the fields that it declares."""

from typing import get_args, get_type_hints

import pytest

from conftest import small_recipe
from sqft_export.recipe.passes import pass_names
from sqft_export.recipe.schema import Recipe, Section
from sqft_export.stages import stage_of

RECIPES = [
    small_recipe(
        "sparsify.reconstruct={}",
        "adapt.distill={teacher: dense-lora}",
        "search={strategy: hill-climb, budget: 2, items: 4}",
        *other,
    )
    for other in ((), ("task={kind: chat, train: train.jsonl}",), ("export.targets=[onnx]",))
]
SECTIONS = {n for n in Recipe.model_fields if isinstance(getattr(RECIPES[0], n), Section)}


def sections_of(name: str) -> set[str]:
    """Fields and sections of the recipe type in the signature of a pass's ``run``."""
    (recipe_type,) = get_args(get_type_hints(stage_of(name).run)["context"])
    if recipe_type is Recipe:
        return {*Recipe.model_fields, *(n for n in vars(Recipe) if not n.startswith("_"))}
    return {n for kind in recipe_type.__mro__ for n in vars(kind) if not n.startswith("_")}


@pytest.mark.parametrize("name", pass_names(RECIPES[0]))
def test_a_pass_declares_fields_of_exactly_the_sections_in_its_signature(name):
    stage, shown = stage_of(name), sections_of(name)
    passes = [other for other in pass_names(RECIPES[0]) if stage_of(other) is stage]
    declared = {
        path.partition(".")[0]
        for recipe in RECIPES
        for other in passes
        for path in (*stage.fields(recipe, other), *stage.FREE)
    }
    assert declared <= shown, "declared, but the signature does not show it"
    assert shown & SECTIONS <= declared, "in the signature, but no field of it is declared"
