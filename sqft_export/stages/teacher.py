"""teacher: the dense model with plain LoRA, a baseline of the report and what distillation may ask.

No mask, no grid, no elastic rank; else the recipe's own settings.
"""

from dataclasses import replace

from sqft_export.adapters.files import Base
from sqft_export.adapters.loading import Layers
from sqft_export.adapters.merging import write_merged
from sqft_export.adapters.training import train_on_task
from sqft_export.data.items import load_tokenizer
from sqft_export.recipe.schema import Recipe
from sqft_export.run.launcher import process_rank
from sqft_export.stages import Context

CONSUMES: tuple[str, ...] = ()
READS: tuple[str, ...] = ("model", "train")
VERSION = 4
RESUMES = True
DISTRIBUTED = True


def options(recipe: Recipe) -> dict:
    changes = {"pipeline", "merge_dense", "trainable_scales", "scale_learning_rate", "distill"}
    return {
        "adapt": recipe.training.model_dump(exclude=changes),
        "seed": recipe.seed,
        "set_aside": recipe.set_aside,
    }


def run(context: Context) -> dict:
    """Writes ``adapter/`` in peft's format and ``dense-lora/``, merged."""
    base, tokenizer = Base(context.model), load_tokenizer(context.model)
    # Beside the weight, as plain LoRA trains: a product less than through it.
    beside, folder = replace(base, unmerged=True), context.folder
    trained = train_on_task(context.recipe, beside, tokenizer, folder, context.start, elastic=False)
    if process_rank():
        return {}
    sparsity = write_merged(Layers(base, folder / "adapter"), folder / "dense-lora")
    return {"sparsity": sparsity} | trained.facts
