"""Where a recipe's model and data are, and the digests that stand for them in keys."""

from pathlib import Path
from typing import Any

from sqft_export.data.datasets import SETS, set_names
from sqft_export.data.items import data_files
from sqft_export.data.revisions import dataset_revision
from sqft_export.model.companions import companions, own_file
from sqft_export.model.tensorfiles import TensorFiles
from sqft_export.recipe.schema import HUB, Dataset, Recipe
from sqft_export.run.artifact import digest_of, key_of, sha256_of


def model_digest(folder: Path) -> str:
    """SHA-256 over the files of a model that passes read: weights, configs, tokenizer."""
    weights = TensorFiles(folder).shards
    names = [*(file.name for file in companions(folder)), *weights]
    return key_of({name: sha256_of(own_file(folder, name)) for name in names})


def _hub_sets(recipe: Recipe, split: str, online: bool) -> dict[str, str | None]:
    """Commits of the sets of a task that are read from the hub."""
    task = recipe.task
    if not isinstance(task, Dataset) or task.folder is not None:
        return {}
    sources = {name: SETS[name].hub for name in set_names(task, split)}
    return {
        name: dataset_revision(source[0], None, online)
        for name, source in sources.items()
        if source
    }


def digests(recipe: Recipe, folder: Path | None, online: bool = False) -> dict[str, Any]:
    """What the names in a pass's ``READS`` mean in the facts of its artifact.

    :param online: the hub may be asked for the commits of datasets that are read from it.
    """
    settings = recipe.task.model_dump(exclude={"train", "test", "text", "folder"})

    def split(name: str) -> list[Any]:
        revisions = _hub_sets(recipe, name, online)
        files = [digest_of(file) for file in data_files(recipe, name)]
        return [settings, *files, *([revisions] if revisions else [])]

    config = recipe.calibration
    calibration: Any
    if not recipe.calibrates:
        calibration = None  # no pass reads it; it may be missing
    elif config.source.startswith(HUB):
        name = config.source.removeprefix(HUB)
        calibration = [config.source, dataset_revision(name, config.revision, online)]
    elif config.source == "task":
        calibration = split("train")
    else:
        calibration = digest_of(recipe.resolve(config.source))
    return {
        "model": model_digest(folder) if folder else key_of({"hub": recipe.model.model_dump()}),
        "train": split("train"),
        "calibration": [settings, calibration],
        "test": split("test"),
    }
