"""adapt: train the elastic super-adapter through the pruning mask and the quantization grid."""

from torch import nn

from sqft_export.adapters.files import Base, write_training_log
from sqft_export.adapters.loading import load_compressed
from sqft_export.adapters.stopping import short_training
from sqft_export.adapters.training import has_no_loss, train_on_task
from sqft_export.data.items import TASK_FILES, TRAIN_FIELDS, load_tokenizer
from sqft_export.machine.device import device_of, training_dtype
from sqft_export.machine.launcher import process_rank
from sqft_export.metrics import AdaptMetrics, HeldOutLoss, Metrics
from sqft_export.recipe.schema import Adapt, Recipe
from sqft_export.recipe.sections import TrainingSections
from sqft_export.recipe.view import section_fields
from sqft_export.stages import Context

CONSUMES: tuple[str, ...] = ("sparsify", "reconstruct", "quantize", "teacher")
READS: tuple[str, ...] = ("model", "train", "device", "processes")
SETTINGS = section_fields("adapt", Adapt, without=("save_steps",))
FREE: tuple[str, ...] = ("device", "adapt.save_steps", *TASK_FILES)
VERSION = 7
RESUMES = True
DISTRIBUTED = True


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return all settings of the adapter and of the training data."""
    return (*SETTINGS, *TRAIN_FIELDS, "task.packing")


def _teacher(context: Context[TrainingSections]) -> nn.Module | None:
    """Return the frozen teacher of the distillation loss, or None without distillation."""
    config = context.recipe.training
    if config.distill is None:
        return None
    folder = context.model
    if config.distill.teacher == "dense-lora":
        folder = context.inputs["teacher"].path / "dense-lora"
    dtype = training_dtype(config.precision, device_of(context.recipe.device))
    return load_compressed(Base(folder), dtype)


def run(context: Context[TrainingSections]) -> Metrics:
    """Write ``adapter/`` in peft's format, and ``training.jsonl`` with loss and ranks per step."""
    trained = train_on_task(
        context.recipe,
        context.base(),
        load_tokenizer(context.model),
        context.folder,
        context.start,
        elastic=True,
        teacher=_teacher(context),
        callbacks=context.callbacks,
    )
    if process_rank():
        return Metrics()
    data, log = trained.data, trained.log
    write_training_log(context.folder, log)
    return AdaptMetrics(
        steps=len(log),
        first_loss=log[0]["loss"],
        last_loss=log[-1]["loss"],
        truncated_examples=data.truncated,
        examples_without_answer=sum(example.has_no_answer for example in data.train),
        left_out_examples=sum(has_no_loss(e, context.recipe.training) for e in data.train),
        warnings=short_training(trained.held_out, context.recipe.training.stop, "adapt"),
        held_out=[HeldOutLoss(step=s, loss=x) for s, x in sorted(trained.held_out.items())],
        **trained.facts,
    )
