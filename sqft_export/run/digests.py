"""Where a recipe's model and data are, and the digests that stand for them in keys."""

from pathlib import Path
from typing import Any

from sqft_export.data.items import data_files
from sqft_export.model.companions import companions, own_file
from sqft_export.model.tensorfiles import TensorFiles
from sqft_export.recipe.schema import HUB, Recipe
from sqft_export.run.artifact import digest_of, key_of, sha256_of


def model_digest(folder: Path) -> str:
    """SHA-256 over the files of a model that passes read: weights, configs, tokenizer."""
    weights = TensorFiles(folder).shards
    names = [*(file.name for file in companions(folder)), *weights]
    return key_of({name: sha256_of(own_file(folder, name)) for name in names})


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
        "model": model_digest(folder) if folder else key_of({"hub": recipe.model.model_dump()}),
        "train": split("train"),
        "calibration": [settings, calibration],
        "test": split("test"),
    }
