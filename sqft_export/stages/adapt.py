"""adapt: train the super-adapter, elastic in rank, through mask and grid."""

import shutil

import torch
from peft import PeftModel
from torch import nn

from sqft_export import tasks
from sqft_export.adapters import (
    Base,
    add_adapters,
    elastic_layers,
    load_compressed,
    rank_groups,
    save_adapter,
    set_ranks,
    train_scales,
)
from sqft_export.checkpoint import Checkpoint
from sqft_export.families import adapted
from sqft_export.machine import process_rank
from sqft_export.recipe import Recipe
from sqft_export.stages import Context
from sqft_export.training import draw_ranks, total_steps, train, without_loss, write_log

CONSUMES = ("sparsify", "quantize", "teacher")
READS = ("model", "train")
VERSION = 3
RESUMES = True
DISTRIBUTED = True


def options(recipe: Recipe) -> dict:
    return {
        "adapt": recipe.adapt.model_dump(),
        "seed": recipe.seed,
        "set_aside": recipe.search.items if recipe.search.evaluates else 0,
    }


def new_adapter(recipe: Recipe, base: Base) -> PeftModel:
    """A model with a fresh super-adapter, seeded."""
    config = recipe.adapt
    model = load_compressed(base, getattr(torch, config.precision))
    torch.manual_seed(recipe.seed)
    family = Checkpoint(base.folder).family
    targets, _ = adapted(family, config.target_modules, config.elastic_groups)
    return add_adapters(model, targets, config.max_rank, config.alpha, config.dropout)


def groups_of(context: Context, model: nn.Module) -> dict[str, list[str]]:
    """The elastic groups of a model with adapters; none where ranks are not elastic."""
    family, config = Checkpoint(context.model).family, context.recipe.adapt
    _, groups = adapted(family, config.target_modules, config.elastic_groups)
    return rank_groups(elastic_layers(model), family.blocks, groups if config.elastic else ())


def _teacher(context: Context) -> nn.Module | None:
    """The model that the loss compares with, frozen."""
    config = context.recipe.adapt
    if config.distill is None:
        return None
    folder = context.model
    if config.distill.teacher == "dense-lora":
        folder = context.inputs["teacher"].path / "dense-lora"
    return load_compressed(Base(folder), getattr(torch, config.precision))


def run(context: Context) -> dict:
    """Writes ``adapter/`` in peft's format and ``training.jsonl`` with loss and ranks a step."""
    recipe, config = context.recipe, context.recipe.adapt
    model = new_adapter(recipe, context.base())
    if config.trainable_scales:
        train_scales(model)
    layers, groups = elastic_layers(model), groups_of(context, model)
    tokenizer = tasks.load_tokenizer(context.model)
    data = tasks.load(recipe, tokenizer)

    def ranks_at(step: int) -> dict[str, int]:
        return draw_ranks(list(groups), config.ranks, recipe.seed, step)

    log = train(
        model,
        data.train,
        config,
        recipe.seed,
        tokenizer.pad_token_id or 0,
        context.folder / "training",
        before_step=lambda step: set_ranks(layers, groups, ranks_at(step)),
        advance=context.start(total_steps(config, len(data.train))),
        teacher=_teacher(context),
    )
    save_adapter(model, context.folder / "adapter")
    if process_rank():
        return {}
    # The step logged as n is the one that began at n - 1.
    write_log(
        context.folder / "training.jsonl",
        [{**entry, "ranks": ranks_at(int(entry["step"]) - 1)} for entry in log],
    )
    # Training checkpoints serve an interrupted run alone.
    shutil.rmtree(context.folder / "training")
    return {
        "steps": len(log),
        "first_loss": log[0]["loss"],
        "last_loss": log[-1]["loss"],
        "truncated_examples": data.truncated,
        "left_out_examples": sum(without_loss(e, config) for e in data.train),
    }
