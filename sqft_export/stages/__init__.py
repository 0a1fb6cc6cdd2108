"""The passes, one module per pass. Each module implements :class:`Stage` and imports no other."""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, cast

from sqft_export.adapters.files import Base
from sqft_export.artifacts.store import Artifact, Facts
from sqft_export.machine.progress import Start
from sqft_export.metrics import Metrics
from sqft_export.recipe.schema import Recipe
from sqft_export.recipe.sections import AdaptSection

if TYPE_CHECKING:
    from transformers import TrainerCallback

# The recipe fields that :meth:`Context.base` reads.
BASE_FIELDS = ("adapt.pipeline", "adapt.merge_dense", "adapt.trainable_scales")


# The recipe sections that a pass reads: a type of ``recipe/sections.py``, or several combined.
_Sections = TypeVar("_Sections", covariant=True)


@dataclass(frozen=True)
class Context(Generic[_Sections]):
    """The inputs of a pass. ``Context[Sections]`` names the recipe sections that the pass reads.

    name: name of the pass, such as ``export-onnx``.
    recipe: view of the recipe with only the fields that the pass declares. mypy refuses a read of
        another section, and the view refuses a read of another field.
    model: folder of the base model.
    inputs: name of a consumed pass -> its sealed artifact.
    folder: output folder of the pass.
    start: ``start(total) -> advance`` starts the progress bar.
    lineage: name of a pass -> its manifest facts, for this pass and all passes before it that its
        inputs depend on.
    callbacks: further callbacks of a training loop, such as those that log its steps.
    """

    name: str
    recipe: _Sections
    model: Path
    inputs: dict[str, Artifact]
    folder: Path
    start: Start
    lineage: dict[str, Facts] = field(default_factory=dict)
    callbacks: "tuple[TrainerCallback, ...]" = ()

    @property
    def reads(self) -> dict[str, object]:
        """Return name in ``READS`` -> its value in the cache key."""
        facts = self.lineage.get(self.name)
        return facts["reads"] if facts else {}

    def path(self, name: str) -> Path | None:
        """Return the folder of an input, or None if the recipe has no such pass."""
        return self.inputs[name].path if name in self.inputs else None

    def base(self: "Context[AdaptSection]") -> Base:
        """Return the base model of the adapter.

        Its grids have the trained scales if search has written them.
        """
        adapt, grids = self.recipe.adapt, self.path("quantize")
        if adapt is None:
            return Base(self.latest_model(), self.path("sparsify"), grids)
        if "search" in self.inputs and adapt.trainable_scales:
            grids = self.inputs["search"].path
        masks = self.path("sparsify") if adapt.masked else None
        return Base(self.latest_model(), masks, grids, adapt.unmerged)

    def latest_model(self) -> Path:
        """Return the model folder of the last pass before training."""
        for name in ("quantize", "reconstruct", "sparsify"):
            if name in self.inputs:
                return self.inputs[name].path / "model"
        return self.model


class Stage(Protocol):
    """The interface of a pass.

    CONSUMES: passes whose artifacts it reads, if the recipe has them.
    READS: names from ``run/digests.py`` of everything else that its result depends on.
    FREE: recipe fields that it reads but that cannot change its result. Examples are the path of a
        file whose content is in ``READS``, and the number of steps between training checkpoints.
    VERSION: raised when a change of the code changes the output.
    RESUMES: True if it resumes an interrupted run; False if it starts again.
    DISTRIBUTED: True if every process of a launcher runs it; False if only the first does.
    """

    CONSUMES: tuple[str, ...]
    READS: tuple[str, ...]
    FREE: tuple[str, ...]
    VERSION: int
    RESUMES: bool
    DISTRIBUTED: bool

    def fields(self, recipe: Recipe, name: str, /) -> tuple[str, ...]:
        """Return the recipe fields that the result depends on, as paths for ``recipe/view.py``.

        Their values are part of the cache key. The pass can read only these fields and ``FREE``.

        :param name: name of the pass, such as ``export-onnx``.
        """

    def run(self, context: Context[Recipe], /) -> Metrics:
        """Do the work in ``context.folder`` and return metrics."""


def stage_of(name: str) -> Stage:
    """Return the module of a pass; all ``export-<target>`` passes share ``export``."""
    return cast(Stage, importlib.import_module(f"{__name__}.{name.partition('-')[0]}"))


if TYPE_CHECKING:  # mypy checks every module against the protocol
    from sqft_export.stages import (
        adapt,
        baselines,
        benchmark,
        export,
        merge,
        peers,
        quantize,
        reconstruct,
        report,
        search,
        sparsify,
        teacher,
        verify,
    )

    _STAGES: tuple[Stage, ...] = (
        adapt,
        baselines,
        benchmark,
        export,
        merge,
        peers,
        quantize,
        reconstruct,
        report,
        search,
        sparsify,
        teacher,
        verify,
    )
