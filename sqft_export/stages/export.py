"""export-<target>: a deployment folder for one runtime, made from the merged model."""

from typing import Any

from sqft_export.model.checkpoint import file_bytes
from sqft_export.packed.folders import PACKED, pack
from sqft_export.recipe.schema import Recipe
from sqft_export.stages import Context
from sqft_export.targets import target

CONSUMES: tuple[str, ...] = ("merge",)
READS: tuple[str, ...] = ()
VERSION = 4
RESUMES = False
DISTRIBUTED = False


def options(recipe: Recipe) -> dict:
    return recipe.export.model_dump(exclude={"targets"})


def run(context: Context) -> dict:
    """Writes ``model/``, and ``packed/`` where the recipe asks for it."""
    advance = context.start(1)
    folder = context.folder / "model"
    folder.mkdir()
    runtime = context.name.removeprefix("export-")
    merged = context.inputs["merge"].path
    target(runtime).export(merged / "model", folder, context.recipe.export)
    if context.recipe.adapt.unmerged:
        target(runtime).add_adapter(folder, merged / "adapter")
    metrics: dict[str, Any] = {"bytes": file_bytes(folder)}
    if context.recipe.export.sparse_files:
        packed = context.folder / PACKED
        metrics["packed"] = pack(folder, packed, context.recipe.export.entropy)
    advance()
    return metrics
