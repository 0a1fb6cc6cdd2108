"""Find or download a recipe's base model on the Hugging Face hub."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypedDict, TypeVar

from sqft_export.errors import UserError
from sqft_export.model.tensorfiles import TensorFiles, index_name
from sqft_export.recipe.schema import Recipe

HUB_ADVICE = "use a local folder with MODEL_PATH=<folder>, or run the embedded model: make recipe"
# Configs and tokenizers at the top of a repository; the index lists the weights.
COMPANION_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja")
WEIGHTS_FILE = "model.safetensors"


_Answer = TypeVar("_Answer")


class WeightIndex(TypedDict, total=False):
    """The index of a sharded checkpoint.

    weight_map: tensor name -> file name.
    """

    weight_map: dict[str, str]


@dataclass(frozen=True)
class Download:
    """A planned download of a hub model.

    hub: name of the repository.
    names: names of all files that a run needs.
    bytes: total size of the files that are not on this machine.
    cache: cache folder of the hub's library.
    """

    hub: str
    names: tuple[str, ...]
    bytes: int
    cache: Path


def _is_complete(folder: Path) -> bool:
    """Return whether a downloaded folder has its config and all files of weights."""
    if not (folder / "config.json").is_file():
        return False
    try:
        return all((folder / name).is_file() for name in TensorFiles(folder).shards)
    except UserError:  # the index is incomplete
        return False


def needed_files(names: list[str], read_index: Callable[[], WeightIndex]) -> list[str]:
    """Return the files of a repository that are needed to read a model.

    The same weights in other forms are left out: ``consolidated.safetensors``, ``original/``,
    ``.bin``, ``.pth``, ``.gguf``, ``model.fp16.safetensors``, exports in folders.

    :param names: paths of all files of the repository.
    :param read_index: returns the index of the weights; called only if ``names`` has one.
    """
    top = [name for name in names if "/" not in name]
    companions = [n for n in top if any(fnmatchcase(n, p) for p in COMPANION_PATTERNS)]
    shards = {WEIGHTS_FILE}
    if index_name("model") in top:
        shards = set(map(str, read_index().get("weight_map", {}).values()))
    return companions + [name for name in top if name in shards]


def planned_download(recipe: Recipe) -> Download:
    """Query the hub for the files to download for a recipe's model.

    :raises UserError: if the hub can't be reached.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache

    hub = str(recipe.model.hub)

    def ask() -> Download:
        info = HfApi().model_info(hub, revision=recipe.model.revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        index = index_name("model")

        def read_index() -> WeightIndex:
            return json.loads(Path(hf_hub_download(hub, index, revision=info.sha)).read_text())

        names = needed_files(list(sizes), read_index)
        missing = [n for n in names if not try_to_load_from_cache(hub, n, revision=info.sha)]
        size = sum(sizes[name] for name in missing)
        return Download(hub, tuple(names), size, Path(constants.HF_HUB_CACHE))

    return _call_hub(recipe, ask)


def download_model(recipe: Recipe, download: Download) -> Path:
    """Download the files of :func:`planned_download` and return the model's folder.

    :raises UserError: if the hub can't be reached.
    """
    from huggingface_hub import snapshot_download

    def fetch() -> Path:
        names = [_escape_pattern(name) for name in download.names]
        revision = recipe.model.revision  # a branch name, since the offline cache is keyed by it
        return Path(snapshot_download(download.hub, revision=revision, allow_patterns=names))

    return _call_hub(recipe, fetch)


def _escape_pattern(name: str) -> str:
    """Return a pattern that matches only this file name."""
    return "".join(f"[{c}]" if c in "[*?" else c for c in name)


def _call_hub(recipe: Recipe, ask: Callable[[], _Answer]) -> _Answer:
    """Call the hub.

    :raises UserError: naming the model and what helps, if the call fails.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return ask()
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{recipe.file}: model.hub: {recipe.model.hub} can't be downloaded from the Hugging "
            f"Face hub ({type(error).__name__}); {HUB_ADVICE}"
        ) from error


def model_folder(recipe: Recipe, download: bool) -> Path | None:
    """Return the folder of the base model; None for a hub model that is not on this machine.

    :param download: download a missing hub model.
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
    """Return the hub model's folder in this machine's cache; None if it is incomplete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    model = recipe.model
    try:
        found = snapshot_download(str(model.hub), revision=model.revision, local_files_only=True)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        return None
    return Path(found) if _is_complete(Path(found)) else None
