"""Where a recipe's model and data are, and the digests that stand for them in keys."""

from math import prod
from pathlib import Path
from typing import Any

from sqft_export import tasks
from sqft_export.artifact import digest_of, key_of
from sqft_export.checkpoint import Checkpoint
from sqft_export.errors import UserError
from sqft_export.families import shapes
from sqft_export.recipe import HUB, Recipe

WAYS_OUT = "use a local folder with MODEL_PATH=<folder>, or run the embedded model: make recipe"


def model_folder(recipe: Recipe, download: bool) -> Path | None:
    """Folder of the base model; None for a hub model that is not on this machine.

    :param download: fetch a hub model that is missing (the only network access there is).
    :raises UserError: if the folder is missing, or the hub can't be reached.
    """
    model = recipe.model
    if model.path is not None:
        folder = recipe.resolve(model.path)
        if not (folder / "config.json").is_file():
            raise UserError(f"{recipe.file}: model.path: no Hugging Face model in {folder}")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model.hub,
                revision=model.revision,
                local_files_only=not download,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if not download:
            return None
        raise UserError(
            f"{recipe.file}: model.hub: {model.hub} can't be fetched from the Hugging Face hub "
            f"({type(error).__name__}); {WAYS_OUT}"
        ) from error


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
                f"model.config does not describe it; {WAYS_OUT}"
            )
        return shapes(expected, f"{recipe.file}: model.config")
    checkpoint = Checkpoint(folder)
    _ = checkpoint.family  # refuses an unknown model type
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


def digests(recipe: Recipe, folder: Path | None) -> dict[str, Any]:
    """What the names in a pass's ``READS`` mean in the facts of its artifact."""
    settings = recipe.task.model_dump(exclude={"train", "test", "text", "folder"})

    def split(name: str) -> list[Any]:
        return [settings, *map(digest_of, tasks.data_files(recipe, name))]

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
