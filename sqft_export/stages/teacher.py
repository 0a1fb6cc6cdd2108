"""teacher: the dense model with plain LoRA, a baseline of the report and what distillation may ask.

No mask, no grid, no elastic rank; else the recipe's own settings.
"""

from dataclasses import replace

from sqft_export.adapters.files import Base
from sqft_export.adapters.loading import Layers
from sqft_export.adapters.merging import write_merged
from sqft_export.adapters.training import train_on_task
from sqft_export.data.items import TRAIN_FIELDS, TRAIN_FILES, load_tokenizer
from sqft_export.recipe.schema import Adapt, Recipe
from sqft_export.recipe.view import section_fields
from sqft_export.run.launcher import process_rank
from sqft_export.stages import Context

CONSUMES: tuple[str, ...] = ()
READS: tuple[str, ...] = ("model", "train", "device", "processes")
_OF_COMPRESSED = ("pipeline", "merge_dense", "trainable_scales", "scale_learning_rate", "distill")
SETTINGS = section_fields("adapt", Adapt, without=(*_OF_COMPRESSED, "elastic", "save_steps"))
FREE: tuple[str, ...] = ("device", "adapt.save_steps", *TRAIN_FILES)
VERSION = 5
RESUMES = True
DISTRIBUTED = True


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    return (*SETTINGS, *TRAIN_FIELDS)


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
