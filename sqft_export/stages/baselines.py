"""baselines: the pruned and quantized base before tuning, in the format of the merged model."""

import torch

from sqft_export.adapters import load_compressed
from sqft_export.checkpoint import Checkpoint
from sqft_export.recipe import Recipe
from sqft_export.stages import Context
from sqft_export.stages.merge import write_merged

CONSUMES = ("sparsify", "quantize")
READS = ("model",)
VERSION = 2


def options(recipe: Recipe) -> dict:
    return {}


def run(context: Context) -> dict:
    """Writes ``sparse-quantized/``."""
    base = context.base()
    model = load_compressed(base, torch.float32)
    folder = context.folder / "sparse-quantized"
    return {"sparsity": write_merged(model, Checkpoint(base.folder), folder, base.grids)}
