"""baselines: the pruned and quantized base before tuning, in the format of the merged model."""

from sqft_export.adapters import Layers
from sqft_export.recipe import Recipe
from sqft_export.stages import Context
from sqft_export.stages.merge import write_merged

CONSUMES = ("sparsify", "quantize")
READS = ("model",)
VERSION = 3


def options(recipe: Recipe) -> dict:
    return {}


def run(context: Context) -> dict:
    """Writes ``sparse-quantized/``."""
    base = context.base()
    return {"sparsity": write_merged(Layers(base), context.folder / "sparse-quantized")}
