"""Where a recipe's base model is; the only network access there is."""

from pathlib import Path

from sqft_export.errors import UserError
from sqft_export.recipe.schema import Recipe

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
