"""baselines: the models that the result is compared with, in the same format.

``dense-lora`` is the base model with plain LoRA (no mask, no grid, no elastic rank) trained with
the recipe's own settings; ``sparse-quantized`` is the pruned and quantized base before tuning.
"""

import shutil

import torch

from sqft_export import tasks
from sqft_export.adapters import load_compressed
from sqft_export.checkpoint import Checkpoint
from sqft_export.recipe import Recipe
from sqft_export.stages import Context
from sqft_export.stages.adapt import new_adapter
from sqft_export.stages.merge import write_merged
from sqft_export.training import total_steps, train

CONSUMES = ("sparsify", "quantize")
READS = ("model", "train")
VERSION = 1
RESUMES = True
MADE = ("dense-lora", "sparse-quantized")


def options(recipe: Recipe) -> dict:
    wanted = [name for name in recipe.benchmark.baselines if name in MADE]
    return {"baselines": wanted, "adapt": recipe.adapt.model_dump(), "seed": recipe.seed}


def _dense_lora(context: Context) -> dict[str, float]:
    recipe, config = context.recipe, context.recipe.adapt
    model = new_adapter(recipe, context.model, None, None)
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
    shutil.rmtree(context.folder / "training")
    return write_merged(model, Checkpoint(context.model), context.folder / "dense-lora", None)


def run(context: Context) -> dict:
    """Writes ``dense-lora/`` and ``sparse-quantized/``, as far as the recipe asks for them."""
    sparsity = {}
    if "dense-lora" in context.recipe.benchmark.baselines:
        sparsity["dense-lora"] = _dense_lora(context)["all"]
    if "sparse-quantized" in context.recipe.benchmark.baselines and "quantize" in context.inputs:
        base, masks, grids = context.base()
        model = load_compressed(base, masks, grids, torch.float32)
        folder = context.folder / "sparse-quantized"
        sparsity["sparse-quantized"] = write_merged(model, Checkpoint(base), folder, grids)["all"]
    return {"sparsity": sparsity}
