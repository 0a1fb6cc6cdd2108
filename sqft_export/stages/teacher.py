"""teacher: the dense model with plain LoRA, a baseline of the report and what distillation may ask.

No mask, no grid, no elastic rank; else the recipe's own settings.
"""

import shutil

from sqft_export import tasks
from sqft_export.adapters import Base, Layers, save_adapter
from sqft_export.machine import process_rank
from sqft_export.recipe import Recipe
from sqft_export.stages import Context
from sqft_export.stages.adapt import new_adapter
from sqft_export.stages.merge import write_merged
from sqft_export.training import total_steps, train

CONSUMES = ()
READS = ("model", "train")
VERSION = 3
RESUMES = True
DISTRIBUTED = True


def options(recipe: Recipe) -> dict:
    changes = {"pipeline", "merge_dense", "trainable_scales", "scale_learning_rate", "distill"}
    return {
        "adapt": recipe.adapt.model_dump(exclude=changes),
        "seed": recipe.seed,
        "set_aside": recipe.search.items if recipe.search.evaluates else 0,
    }


def run(context: Context) -> dict:
    """Writes ``adapter/`` in peft's format and ``dense-lora/``, merged."""
    recipe, config = context.recipe, context.recipe.adapt
    base = Base(context.model)
    model = new_adapter(recipe, base)
    tokenizer = tasks.load_tokenizer(context.model)
    examples = tasks.load(recipe, tokenizer).train
    train(
        model,
        examples,
        config,
        recipe.seed,
        tokenizer.pad_token_id or 0,
        context.folder / "training",
        before_step=lambda step: None,
        advance=context.start(total_steps(config, len(examples))),
    )
    adapter = context.folder / "adapter"
    save_adapter(model, adapter)
    if process_rank():
        return {}
    shutil.rmtree(context.folder / "training")
    return {"sparsity": write_merged(Layers(base, adapter), context.folder / "dense-lora")}
