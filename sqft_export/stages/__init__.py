"""One file per pass.

CONSUMES            passes whose artifacts it reads, where the recipe has them
READS               of "model", "train", "test", "calibration": what else its result depends on
VERSION             raised when the code changes what comes out
options(recipe)     the settings its result depends on
RESUMES             True if it continues from what an interrupted run left (default: starts over)
DISTRIBUTED         True if all processes of a launcher run it (default: the first alone)
run(context)        does the work in ``context.folder`` and returns metrics
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqft_export.adapters import Base
from sqft_export.artifact import Artifact
from sqft_export.recipe import Recipe

Advance = Callable[[], None]


@dataclass(frozen=True)
class Context:
    """What a pass may touch.

    name: the pass, such as ``export-onnx``.
    model: folder of the base model.
    inputs: sealed artifacts of the passes it consumes, by name.
    folder: where it writes.
    start: ``start(total) -> advance`` begins its progress bar.
    """

    name: str
    recipe: Recipe
    model: Path
    inputs: dict[str, Artifact]
    folder: Path
    start: Callable[[int], Advance]

    def path(self, name: str) -> Path | None:
        """Folder of an input, None where the recipe does without that pass."""
        return self.inputs[name].path if name in self.inputs else None

    def base(self) -> Base:
        """What training starts from, with the scales that it ended with once there are such."""
        adapt, grids = self.recipe.adapt, self.path("quantize")
        if adapt.trainable_scales and "search" in self.inputs:
            grids = self.inputs["search"].path
        masks = self.path("sparsify") if adapt.masked else None
        return Base(self.latest_model(), masks, grids, adapt.apart)

    def latest_model(self) -> Path:
        """The last model folder before adapters: quantized, else sparse, else the base model."""
        for name in ("quantize", "sparsify"):
            if name in self.inputs:
                return self.inputs[name].path / "model"
        return self.model
