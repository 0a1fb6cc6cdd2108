"""Quality gates: measure what each pass costs on held-out data, and stop if it is too much.

After every pass that changes the model, its perplexity and its KL divergence from the previous
model are measured. They are written to ``quality-<pass>-<key>.json`` in the folder of the run. The
loss of accuracy is judged at the benchmark. Deployments are not measured here: the setting
``verify.divergence`` bounds the rounding of a runtime.
"""

from functools import cached_property
from pathlib import Path

import numpy as np

from sqft_export.adapters.files import Base
from sqft_export.artifacts.store import Artifact, Store, digest_of, key_of
from sqft_export.data.items import data_files
from sqft_export.errors import GateError
from sqft_export.machine.device import device_of
from sqft_export.measure.quality import (
    PassModel,
    PassQuality,
    SampledItem,
    compare_quality,
    held_out_sample,
    quality_file,
    read_quality,
    target_distributions,
    write_quality,
)
from sqft_export.measure.results import FINAL_KINDS, BenchmarkResults, BenchmarkRow
from sqft_export.recipe.schema import Recipe

# Passes that output a model, in order; the first one is compared with the base model.
MEASURED_PASSES = ("sparsify", "reconstruct", "quantize", "search", "merge")
TASK_TRAINED_PASSES = ("reconstruct", "search")
MEASURED_VERSION = 1  # increase it when the measurement changes
WARN_KL = 1.0  # nats per token
WARN_PERPLEXITY_RATIO = 2.0  # ratio to the perplexity of the previous model
WARN_DROP_POINTS = 5.0  # percentage points of accuracy
BASE = "the base model"


def model_after(name: str, recipe: Recipe, base: Path, made: dict[str, Artifact]) -> PassModel:
    """Return the model after a pass, or the base model for ``BASE``.

    :param base: folder of the base model.
    :param made: artifacts by pass name.
    """
    path = {other: artifact.path for other, artifact in made.items()}
    if name == BASE:
        return PassModel(Base(base, None, base))
    if name == "merge":
        model = path["merge"] / "model"
        adapter = path["merge"] / "adapter" if recipe.unmerged else None
        return PassModel(Base(model, None, model, recipe.unmerged), adapter)
    if name != "search":
        return PassModel(Base(path[name] / "model", None, path[name]))
    before = [path[n] / "model" for n in ("sparsify", "reconstruct", "quantize") if n in path]
    grids = path["search"] if recipe.training.trainable_scales else path.get("quantize")
    masks = path.get("sparsify") if recipe.training.masked else None
    started = Base([base, *before][-1], masks, grids, recipe.unmerged)
    return PassModel(started, path["search"] / "adapter")


class QualityGates:
    """Measure each finished pass, and stop the run if it costs more than the recipe allows.

    :param model: folder of the base model.
    :param store: the run's artifacts.
    """

    def __init__(self, recipe: Recipe, model: Path, store: Store):
        self.recipe, self.model, self.root = recipe, model, store.root
        self._hash_file = store.hashes.sha256_of
        self._sample: list[SampledItem] = []
        # Name and distributions of the last measured model.
        self._last: tuple[str, np.ndarray] | None = None

    def check(self, name: str, made: dict[str, Artifact]) -> list[str]:
        """Return warnings about a finished pass.

        :param made: artifacts of this and all earlier passes.
        :raises GateError: naming the pass, if it costs more than the recipe's ``gates`` allow.
        """
        if name == "benchmark":
            return self._accuracy_warnings(made[name])
        if name not in MEASURED_PASSES:
            return []
        file = quality_file(self.root, name, made[name].key)
        record = read_quality(file)
        if record is None or record.data != self._data:
            record = self._measure(name, made)
            write_quality(file, record)
        return self._judge(name, record)

    @cached_property
    def _data(self) -> str:
        """Digest of the sample's source and the method; records with another one are outdated."""
        files_of_task = {"train", "test", "text", "folder", "score_file"}
        task = self.recipe.task.model_dump(exclude=files_of_task)
        files = [digest_of(f, self._hash_file) for f in data_files(self.recipe, "test")]
        return key_of({"version": MEASURED_VERSION, "task": task, "test": files})

    def _measure(self, name: str, made: dict[str, Artifact]) -> PassQuality:
        earlier = [
            other for other in MEASURED_PASSES[: MEASURED_PASSES.index(name)] if other in made
        ]
        before = [BASE, *earlier][-1]
        if self._last is None or self._last[0] != before:
            self._last = before, self._distributions(before, made)
        after = self._distributions(name, made)
        found = compare_quality(
            self._last[1],
            after,
            self._sample,
            pass_name=name,
            before_name=before,
            data=self._data,
        )
        self._last = name, after
        return found

    def _distributions(self, name: str, made: dict[str, Artifact]) -> np.ndarray:
        if not self._sample:
            self._sample = held_out_sample(self.recipe, self.model)
        model = model_after(name, self.recipe, self.model, made)
        return target_distributions(model, self._sample, device_of(self.recipe.device))

    def _judge(self, name: str, record: PassQuality) -> list[str]:
        divergence, limit = record.kl_nats, self.recipe.gates.kl
        text = (
            f"{name}: KL divergence from {record.before} is {divergence:.4g} nats per token, "
            f"perplexity {record.perplexity:.4g} after {record.perplexity_before:.4g}, on "
            f"{record.tokens} held-out tokens"
        )
        # Training changes a model on purpose, so there a lower perplexity is an improvement.
        worse = not record.perplexity <= record.perplexity_before
        trains = name in TASK_TRAINED_PASSES or (
            name == "quantize" and self.recipe.quantize.reconstruct
        )
        if limit is not None:
            if not divergence <= limit and (worse or not trains):
                raise GateError(f"{text}; gates.kl allows {limit:g}. {_advice(name)}")
            return []
        much = not record.perplexity <= WARN_PERPLEXITY_RATIO * record.perplexity_before
        if much or (not trains and not divergence <= WARN_KL):
            return [f"{text}; the warning limits are {WARN_KL:g} nats and twice the perplexity"]
        return []

    def _accuracy_warnings(self, benchmark: Artifact) -> list[str]:
        """Compare the accuracy of the merged model and the deployments with the dense base's."""
        file = benchmark.path / "results.json"
        rows = BenchmarkResults.parse(file.read_text(), str(file)).rows
        dense = [row.accuracy for row in rows if row.kind == "base"]
        limit, warnings = self.recipe.gates.accuracy_drop, list[str]()
        for row in (row for row in rows if dense and row.kind in FINAL_KINDS):
            drop = 100 * (dense[0] - row.accuracy)
            text = (
                f"benchmark: {row.name} answers {100 * row.accuracy:.1f} % right, {drop:.1f} "
                f"points below the dense base's {100 * dense[0]:.1f} %"
            )
            if limit is not None and drop > limit:
                raise GateError(
                    f"{text}; gates.accuracy_drop allows {limit:g}. {_advice('benchmark')}"
                )
            if limit is None and drop > WARN_DROP_POINTS and not _is_insignificant(row):
                warnings.append(text)
        return warnings[:1]


def _is_insignificant(row: BenchmarkRow) -> bool:
    """Return whether the row does not differ significantly from the first (paired test)."""
    return row.p_same_as_first is not None and row.p_same_as_first >= 0.05


def _advice(name: str) -> str:
    settings = {
        "sparsify": "Lower sparsify.sparsity, try sparsify.reconstruct",
        "quantize": "Raise quantize.bits, lower quantize.group_size",
        "search": "Look at adapt.learning_rate",
        "reconstruct": "Look at sparsify.reconstruct.learning_rate",
        "merge": "Look at adapt.merge_dense",
    }
    first = settings.get(name, "Lower sparsify.sparsity, raise quantize.bits, train longer")
    return f"{first}, or raise the gate; finished passes are kept"
