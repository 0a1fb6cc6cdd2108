"""One file per pass; :class:`Stage` says what each offers.  Stages import no sibling."""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from sqft_export.adapters.files import Base
from sqft_export.recipe.schema import Recipe
from sqft_export.run.artifact import Artifact
from sqft_export.run.progress import Start

# The recipe fields that :meth:`Context.base` reads.
BASE_FIELDS = ("adapt.pipeline", "adapt.merge_dense", "adapt.trainable_scales")


@dataclass(frozen=True)
class Context:
    """What a pass may touch.

    name: the pass, such as ``export-onnx``.
    model: folder of the base model.
    inputs: sealed artifacts of the passes it consumes, by name.
    folder: where it writes.
    start: ``start(total) -> advance`` begins its progress bar.
    lineage: the facts of this pass, and of every one that its inputs are made from, by name.
    recipe: a view of it, without the fields that the pass does not declare.
    """

    name: str
    recipe: Recipe
    model: Path
    inputs: dict[str, Artifact]
    folder: Path
    start: Start
    lineage: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def reads(self) -> dict[str, Any]:
        """What the names in ``READS`` stand for in the key."""
        return self.lineage.get(self.name, {}).get("reads", {})

    def path(self, name: str) -> Path | None:
        """Folder of an input, None where the recipe does without that pass."""
        return self.inputs[name].path if name in self.inputs else None

    def base(self) -> Base:
        """What training starts from, with the scales that it ended with once there are such."""
        adapt, grids = self.recipe.adapt, self.path("quantize")
        if adapt is None:
            return Base(self.latest_model(), self.path("sparsify"), grids)
        if "search" in self.inputs and adapt.trainable_scales:
            grids = self.inputs["search"].path
        masks = self.path("sparsify") if adapt.masked else None
        return Base(self.latest_model(), masks, grids, adapt.unmerged)

    def latest_model(self) -> Path:
        """The last model folder before adapters."""
        for name in ("quantize", "reconstruct", "sparsify"):
            if name in self.inputs:
                return self.inputs[name].path / "model"
        return self.model


class Stage(Protocol):
    """A pass.

    CONSUMES: passes whose artifacts it reads, where the recipe has them.
    READS: of the names in ``run/digests.py``: what else its result depends on.
    FREE: recipe fields it reads that can't change its result: the names of files whose content is
        in ``READS``, the device whose kind is there, when a training is saved.
    VERSION: raised when the code changes what comes out.
    RESUMES: whether it continues from what an interrupted run left, or starts over.
    DISTRIBUTED: whether all processes of a launcher run it, or the first alone.
    """

    CONSUMES: tuple[str, ...]
    READS: tuple[str, ...]
    FREE: tuple[str, ...]
    VERSION: int
    RESUMES: bool
    DISTRIBUTED: bool

    def fields(self, recipe: Recipe, name: str, /) -> tuple[str, ...]:
        """The recipe fields its result depends on, as ``recipe/view.py`` takes them: its key has
        their values, and it can read no others but those in ``FREE``.

        :param name: of the pass, such as ``export-onnx``.
        """

    def run(self, context: Context, /) -> dict[str, Any]:
        """Do the work in ``context.folder`` and return metrics."""


def stage_of(name: str) -> Stage:
    """The module of a pass; ``export-openvino`` and ``export-onnx`` share ``export``."""
    return cast(Stage, importlib.import_module(f"{__name__}.{name.partition('-')[0]}"))


if TYPE_CHECKING:  # mypy holds every module to the protocol
    from sqft_export.stages import (
        adapt,
        baselines,
        benchmark,
        export,
        merge,
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
        quantize,
        reconstruct,
        report,
        search,
        sparsify,
        teacher,
        verify,
    )
