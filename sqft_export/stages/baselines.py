"""baselines: write the pruned and quantized base, untuned, in the merged model's format."""

from sqft_export.adapters.loading import Layers
from sqft_export.adapters.merging import write_merged
from sqft_export.metrics import SparsityMetrics
from sqft_export.recipe.schema import Recipe
from sqft_export.recipe.sections import AdaptSection
from sqft_export.stages import BASE_FIELDS, Context

CONSUMES: tuple[str, ...] = ("sparsify", "reconstruct", "quantize")
READS: tuple[str, ...] = ("model",)
FREE: tuple[str, ...] = ()
VERSION = 3
RESUMES = False
DISTRIBUTED = False


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return the fields that decide which base is written."""
    return BASE_FIELDS


def run(context: Context[AdaptSection]) -> SparsityMetrics:
    """Write ``sparse-quantized/``."""
    base = context.base()
    sparsity = write_merged(Layers(base), context.folder / "sparse-quantized")
    return SparsityMetrics(sparsity=sparsity)
