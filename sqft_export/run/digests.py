"""Digests of a pass's inputs that are not in the recipe (model, data, machine), for its key.

model          weights, configs and tokenizer of the base model
train, test    files of a split, or commits of datasets on the hub
calibration    the file, folder or commit of the calibration samples
configuration  ranks that ``search.configuration`` gives
lm_eval_tasks  task files of the recipe
score          Python file that scores chat answers
device         kind of the device that torch computes on
processes      number of training processes; each trains on separate batches
precision      dtype of torch's benchmark rows on the CPU, for a model with 16-bit weights
"""

from collections.abc import Callable
from pathlib import Path

from sqft_export.artifacts.store import Store, digest_of, key_of
from sqft_export.data.conversations import hub_sources, revision_key
from sqft_export.data.datasets import SETS, hub_datasets, set_names
from sqft_export.data.items import data_files
from sqft_export.data.revisions import dataset_revision
from sqft_export.machine.device import device_of
from sqft_export.machine.launcher import process_count
from sqft_export.machine.precision import fast_precision
from sqft_export.model.companions import companions, file_in_folder
from sqft_export.model.tensorfiles import TensorFiles
from sqft_export.recipe.schema import HUB, Chat, Dataset, Recipe
from sqft_export.search.space import Ranks


def model_digest(folder: Path, sha256_of: Callable[[Path], str]) -> str:
    """Return the SHA-256 of the model files that passes read: weights, configs, tokenizer."""
    weights = TensorFiles(folder).shards
    names = [*(file.name for file in companions(folder)), *weights]
    return key_of({name: sha256_of(file_in_folder(folder, name)) for name in names})


def pin_revisions(recipe: Recipe, online: bool) -> Recipe:
    """Return the recipe with the commits of all hub datasets that it reads.

    Keys contain these commits, and passes read them.

    :param online: query the hub; else the commits in this machine's cache count.
    """
    if recipe.revisions is not None:
        return recipe
    task, calibration = recipe.task, recipe.calibration
    found = {}
    if isinstance(task, Dataset):
        found = {name: dataset_revision(name, None, online) for name in hub_datasets(task)}
    if isinstance(task, Chat):
        for source in hub_sources(task):
            name = source.removeprefix(HUB)
            found[revision_key(source)] = dataset_revision(name, task.revision, online)
    if calibration.source.startswith(HUB):  # keyed by its source, since its revision may differ
        name = calibration.source.removeprefix(HUB)
        found[calibration.source] = dataset_revision(name, calibration.revision, online)
    return recipe.at_revisions(found)


class Digests:
    """Compute the values that the module lists, each once.

    :param folder: folder of the base model; None if it is only on the hub.
    :param store: store of the run, which caches the digests of files.
    """

    def __init__(self, recipe: Recipe, folder: Path | None, store: Store):
        self.recipe, self.folder, self.store = recipe, folder, store
        self._revisions = recipe.revisions or {}
        self._sha256_of = store.hashes.sha256_of
        self._found: dict[str, object] = {}

    def __getitem__(self, name: str) -> object:
        if name not in self._found:
            self._found[name] = getattr(self, f"_{name}")()
        return self._found[name]

    def _model(self) -> str:
        if self.folder is None:
            return key_of({"hub": self.recipe.model.model_dump()})
        return model_digest(self.folder, self._sha256_of)

    def _train(self) -> list[object]:
        return self._split("train")

    def _test(self) -> list[object]:
        return self._split("test")

    def _split(self, name: str) -> list[object]:
        revisions = self._hub_sets(name)
        files = [digest_of(file, self._sha256_of) for file in data_files(self.recipe, name)]
        return [*files, *([revisions] if revisions else [])]

    def _hub_sets(self, split: str) -> dict[str, str | None]:
        """Return the commits of a task's datasets on the hub."""
        task = self.recipe.task
        if isinstance(task, Chat):
            return {s: self._revisions.get(revision_key(s)) for s in hub_sources(task)}
        if not isinstance(task, Dataset) or task.folder is not None:
            return {}
        sources = {name: SETS[name].hub for name in set_names(task, split)}
        return {name: self._revisions.get(source[0]) for name, source in sources.items() if source}

    def _calibration(self) -> object:
        config = self.recipe.calibration
        if not self.recipe.calibrates:
            return None  # no pass reads the samples; they may be missing
        if config.source.startswith(HUB):
            return [config.source, self._revisions[config.source]]
        if config.source == "task":
            return self["train"]
        return digest_of(self.recipe.resolve(config.source), self._sha256_of)

    def _configuration(self) -> Ranks:
        # Its module imports peft, which takes seconds; a refused recipe is reported without.
        from sqft_export.stages.search import configured_ranks

        return configured_ranks(self.recipe)

    def _score(self) -> str | None:
        task = self.recipe.task
        if not isinstance(task, Chat) or task.score_file is None:
            return None
        return digest_of(self.recipe.resolve(task.score_file), self._sha256_of)

    def _lm_eval_tasks(self) -> str | None:
        folder = self.recipe.lm_eval_folder
        return digest_of(folder, self._sha256_of) if folder else None

    def _device(self) -> str:
        setting = self.recipe.device
        return device_of(setting).type if setting == "auto" else setting

    def _processes(self) -> int:
        return process_count()

    def _precision(self) -> str:
        return fast_precision(self.store.root)
