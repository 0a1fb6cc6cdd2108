"""teacher: train the dense model with plain LoRA.

The result is a baseline of the report, and can be the teacher of distillation. It has no mask, no
grid and no elastic ranks. All other settings are those of the recipe.
"""

from dataclasses import replace

from sqft_export.adapters.files import Base
from sqft_export.adapters.loading import Layers
from sqft_export.adapters.merging import write_merged
from sqft_export.adapters.stopping import short_training
from sqft_export.adapters.templates import set_prompt_format
from sqft_export.adapters.training import train_on_task
from sqft_export.data.items import TASK_FILES, TRAIN_FIELDS, load_tokenizer
from sqft_export.machine.launcher import process_rank
from sqft_export.metrics import HeldOutLoss, Metrics, TeacherMetrics
from sqft_export.recipe.schema import Adapt, Recipe
from sqft_export.recipe.sections import TrainingSections
from sqft_export.recipe.view import section_fields
from sqft_export.stages import Context

CONSUMES: tuple[str, ...] = ()
READS: tuple[str, ...] = ("model", "train", "device", "processes")
_COMPRESSION_FIELDS = (
    "pipeline",
    "merge_dense",
    "trainable_scales",
    "scale_learning_rate",
    "distill",
)
SETTINGS = section_fields("adapt", Adapt, without=(*_COMPRESSION_FIELDS, "elastic", "save_steps"))
FREE: tuple[str, ...] = ("device", "adapt.save_steps", *TASK_FILES)
VERSION = 8
RESUMES = True
DISTRIBUTED = True


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return the training settings that apply without compression, and the training data."""
    return (*SETTINGS, *TRAIN_FIELDS, "task.packing")


def run(context: Context[TrainingSections]) -> Metrics:
    """Write ``adapter/`` in peft's format, and ``dense-lora/``, the merged model."""
    base, tokenizer = Base(context.model), load_tokenizer(context.model)
    # Unmerged, as in plain LoRA: this saves the matrix product B A in every step.
    unmerged, folder = replace(base, unmerged=True), context.folder
    trained = train_on_task(
        context.recipe,
        unmerged,
        tokenizer,
        folder,
        context.start,
        elastic=False,
        callbacks=context.callbacks,
    )
    if process_rank():
        return Metrics()
    sparsity = write_merged(Layers(base, folder / "adapter"), folder / "dense-lora")
    set_prompt_format(context.recipe, folder / "dense-lora", tokenizer)
    return TeacherMetrics(
        sparsity=sparsity,
        warnings=short_training(trained.held_out, context.recipe.training.stop, "teacher"),
        held_out=[HeldOutLoss(step=s, loss=x) for s, x in sorted(trained.held_out.items())],
        **trained.facts,
    )
