"""Types of the recipe sections that a function reads. A :class:`Recipe` has all of them.

A parameter of such a type shows which sections a function reads; mypy refuses a read of another
section. A stage combines these types to ``Sections``: its ``run`` takes ``Context[Sections]``.
"""

from pathlib import Path
from typing import Protocol

from sqft_export.recipe.schema import (
    Adapt,
    Benchmark,
    Calibration,
    Export,
    Model,
    Quantize,
    Search,
    Sparsify,
    Task,
    Verify,
)


class TaskSections(Protocol):
    """The section ``task``, the fields that split its data, and the files that it names."""

    @property
    def task(self) -> Task: ...
    @property
    def seed(self) -> int: ...
    @property
    def set_aside(self) -> int: ...
    @property
    def splits_train(self) -> bool: ...
    @property
    def file(self) -> Path: ...
    @property
    def revisions(self) -> dict[str, str | None] | None: ...
    def resolve(self, path: str, /) -> Path: ...


class CalibrationSections(TaskSections, Protocol):
    """The section ``calibration``, and the task, whose training split can be its source."""

    @property
    def calibration(self) -> Calibration: ...


class DeviceSection(Protocol):
    """The field ``device``."""

    @property
    def device(self) -> str: ...


class SparsifySection(Protocol):
    """The section ``sparsify``."""

    @property
    def sparsify(self) -> Sparsify: ...


class QuantizeSection(Protocol):
    """The section ``quantize``; ``scale_bits`` also depends on the targets."""

    @property
    def quantize(self) -> Quantize: ...
    @property
    def scale_bits(self) -> int: ...


class AdaptSection(Protocol):
    """The section ``adapt``; ``training`` is the same section in recipes that train."""

    @property
    def adapt(self) -> Adapt | None: ...
    @property
    def training(self) -> Adapt: ...
    @property
    def unmerged(self) -> bool: ...
    @property
    def dense_update(self) -> bool: ...


class TrainingSections(TaskSections, AdaptSection, DeviceSection, Protocol):
    """The sections that training reads."""


class SearchSection(Protocol):
    """The section ``search``."""

    @property
    def search(self) -> Search: ...


class ExportSection(Protocol):
    """The section ``export``."""

    @property
    def export(self) -> Export: ...


class VerifySections(TaskSections, ExportSection, Protocol):
    """The section ``verify``, and the texts and targets that are compared."""

    @property
    def verify(self) -> Verify: ...


class BenchmarkSection(Protocol):
    """The section ``benchmark``, and the folder of lm-eval tasks that it names."""

    @property
    def benchmark(self) -> Benchmark: ...
    @property
    def lm_eval_folder(self) -> Path | None: ...


class PeersSection(Protocol):
    """The rows of models that are quantized after LoRA, and the targets of the grid's row."""

    @property
    def peers(self) -> tuple[str, ...]: ...
    @property
    def grid_targets(self) -> tuple[str, ...]: ...
    @property
    def scale_bits(self) -> int: ...


class OriginSections(TaskSections, Protocol):
    """The sections that ``provenance.json`` shows."""

    @property
    def name(self) -> str: ...
    @property
    def base_name(self) -> str: ...
    @property
    def model(self) -> Model: ...


class CardSections(OriginSections, SparsifySection, QuantizeSection, AdaptSection, Protocol):
    """The sections that a model card shows."""
