"""Recipes of this package; their names work from any folder."""

from pathlib import Path

BUILTIN_RECIPES = Path(__file__).parent.parent / "recipes"


def builtin_recipes() -> dict[str, Path]:
    """Return name -> file of every recipe in this package."""
    found = {file.stem: file for file in BUILTIN_RECIPES.glob("*.yaml")}
    return dict(sorted(found.items()))


def find_recipe(named: Path) -> Path:
    """Return the file of a recipe, named by its path or by the name of a built-in recipe.

    A file in the current folder takes precedence over a built-in recipe of the same name.
    """
    file = builtin_recipes().get(str(named))
    return named if file is None or named.is_file() else file
