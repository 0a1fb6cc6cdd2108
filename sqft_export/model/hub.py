"""Where a recipe's base model is; the only network access there is."""

from pathlib import Path

from sqft_export.errors import UserError
from sqft_export.model.tensorfiles import TensorFiles
from sqft_export.recipe.schema import Recipe

WAYS_OUT = "use a local folder with MODEL_PATH=<folder>, or run the embedded model: make recipe"


def _is_whole(folder: Path) -> bool:
    """Whether a download was finished: every file of weights that there is to be is there."""
    if not (folder / "config.json").is_file():
        return False
    try:
        return all((folder / name).is_file() for name in TensorFiles(folder).shards)
    except UserError:  # an index cut short
        return False


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
        folder = Path(
            snapshot_download(
                model.hub,
                revision=model.revision,
                local_files_only=not download,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
            )
        )
        return folder if download or _is_whole(folder) else None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if not download:
            return None
        raise UserError(
            f"{recipe.file}: model.hub: {model.hub} can't be fetched from the Hugging Face hub "
            f"({type(error).__name__}); {WAYS_OUT}"
        ) from error
