"""export-<target>: a deployment folder for one runtime, made from the merged model."""

from sqft_export.checkpoint import file_bytes
from sqft_export.recipe import Recipe
from sqft_export.stages import Context
from sqft_export.targets import target

CONSUMES = ("merge",)
READS = ()
VERSION = 3


def options(recipe: Recipe) -> dict:
    return {"onnx_graph": recipe.export.onnx_graph}


def run(context: Context) -> dict:
    """Writes ``model/``."""
    advance = context.start(1)
    folder = context.folder / "model"
    folder.mkdir()
    runtime = context.name.removeprefix("export-")
    merged = context.inputs["merge"].path
    target(runtime).export(merged / "model", folder, context.recipe.export)
    if context.recipe.adapt.apart:
        target(runtime).add_adapter(folder, merged / "adapter")
    advance()
    return {"bytes": file_bytes(folder)}
