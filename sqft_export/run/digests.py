"""Where a recipe's model and data are, and the digests that stand for them in keys."""

from pathlib import Path
from typing import Any

from sqft_export.data.items import data_files
from sqft_export.recipe.schema import HUB, Recipe
from sqft_export.run.artifact import digest_of, key_of


def digests(recipe: Recipe, folder: Path | None) -> dict[str, Any]:
    """What the names in a pass's ``READS`` mean in the facts of its artifact."""
    settings = recipe.task.model_dump(exclude={"train", "test", "text", "folder"})

    def split(name: str) -> list[Any]:
        return [settings, *map(digest_of, data_files(recipe, name))]

    source = recipe.calibration.source
    calibration: Any
    if source.startswith(HUB):
        calibration = source  # with subset and split, which are options, all that is known of it
    else:
        calibration = split("train") if source == "task" else digest_of(recipe.resolve(source))
    return {
        "model": digest_of(folder) if folder else key_of({"hub": recipe.model.model_dump()}),
        "train": split("train"),
        "calibration": [settings, calibration],
        "test": split("test"),
    }
