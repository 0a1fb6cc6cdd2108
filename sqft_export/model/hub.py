"""Where a recipe's base model is; the only network access there is."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sqft_export.errors import UserError
from sqft_export.model.tensorfiles import TensorFiles, index_name
from sqft_export.recipe.schema import Recipe

WAYS_OUT = "use a local folder with MODEL_PATH=<folder>, or run the embedded model: make recipe"
# Configs and tokenizers, at the top of a repository; weights are chosen by their index.
COMPANION_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja")
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Download:
    """The files of a hub model that a run needs and that are not on this machine.

    hub: name of the repository.
    names: of all files that are needed; bytes: of those that are missing here.
    cache: folder that the hub's library keeps them in.
    """

    hub: str
    names: tuple[str, ...]
    bytes: int
    cache: Path


def _is_whole(folder: Path) -> bool:
    """Whether a download was finished: every file of weights that there is to be is there."""
    if not (folder / "config.json").is_file():
        return False
    try:
        return all((folder / name).is_file() for name in TensorFiles(folder).shards)
    except UserError:  # an index cut short
        return False


def needed_files(names: list[str], read_index: Callable[[], dict[str, Any]]) -> list[str]:
    """The files of a repository that a model is read from.

    Left out are the same weights in other forms: ``consolidated.safetensors``, ``original/``,
    ``.bin``, ``.pth``, ``.gguf``, ``model.fp16.safetensors``, exports in folders.

    :param names: of all files, with their folders.
    :param read_index: gives the index of the weights, where there is one.
    """
    top = [name for name in names if "/" not in name]
    companions = [n for n in top if any(fnmatchcase(n, p) for p in COMPANION_PATTERNS)]
    shards = {WEIGHTS}
    if index_name("model") in top:
        shards = set(map(str, read_index().get("weight_map", {}).values()))
    return companions + [name for name in top if name in shards]


def planned_download(recipe: Recipe) -> Download:
    """What the hub has to send for a recipe's model.

    :raises UserError: if the hub can't be reached.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache

    hub = str(recipe.model.hub)

    def ask() -> Download:
        info = HfApi().model_info(hub, revision=recipe.model.revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        index = index_name("model")

        def read_index() -> dict[str, Any]:
            return json.loads(Path(hf_hub_download(hub, index, revision=info.sha)).read_text())

        names = needed_files(list(sizes), read_index)
        missing = [n for n in names if not try_to_load_from_cache(hub, n, revision=info.sha)]
        size = sum(sizes[name] for name in missing)
        return Download(hub, tuple(names), size, Path(constants.HF_HUB_CACHE))

    return _from_hub(recipe, ask)


def download_model(recipe: Recipe, download: Download) -> Path:
    """Fetch what :func:`planned_download` found; the model's folder.

    :raises UserError: if the hub can't be reached.
    """
    from huggingface_hub import snapshot_download

    def fetch() -> Path:
        names = [_literal(name) for name in download.names]
        revision = recipe.model.revision  # the cache knows a branch by its name when offline
        return Path(snapshot_download(download.hub, revision=revision, allow_patterns=names))

    return _from_hub(recipe, fetch)


def _literal(name: str) -> str:
    """A file's name as a pattern that only it fits."""
    return "".join(f"[{c}]" if c in "[*?" else c for c in name)


def _from_hub(recipe: Recipe, ask: Callable[[], Any]) -> Any:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return ask()
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{recipe.file}: model.hub: {recipe.model.hub} can't be fetched from the Hugging Face "
            f"hub ({type(error).__name__}); {WAYS_OUT}"
        ) from error


def model_folder(recipe: Recipe, download: bool) -> Path | None:
    """Folder of the base model; None for a hub model that is not on this machine.

    :param download: fetch a hub model that is missing.
    :raises UserError: if the folder is missing, or the hub can't be reached.
    """
    model = recipe.model
    if model.path is not None:
        folder = recipe.resolve(model.path)
        if not (folder / "config.json").is_file():
            raise UserError(f"{recipe.file}: model.path: no Hugging Face model in {folder}")
        return folder
    if (found := _cached_model(recipe)) or not download:
        return found
    return download_model(recipe, planned_download(recipe))


def _cached_model(recipe: Recipe) -> Path | None:
    """The hub model in the cache of this machine; None where it is not whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    model = recipe.model
    try:
        found = snapshot_download(str(model.hub), revision=model.revision, local_files_only=True)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        return None
    return Path(found) if _is_whole(Path(found)) else None
