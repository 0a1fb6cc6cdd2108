"""Warnings about settings that are allowed but unusual; each has both values and a remedy."""

from collections.abc import Iterator

from sqft_export.data.items import count_examples, data_files
from sqft_export.plan.layout import Layout
from sqft_export.recipe.schema import Chat, Recipe

USUAL_LEARNING_RATES = 1e-6, 1e-2  # lowest and highest usual rate of low-rank adapters
MIN_EPOCHS, MAX_EPOCHS = 0.1, 20.0


def find_training_doubts(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield warnings about the learning rate, the warmup and the number of epochs."""
    adapt = recipe.adapt
    if adapt is None:
        return
    low, high = USUAL_LEARNING_RATES
    if not low <= adapt.learning_rate <= high:
        yield (
            f"adapt.learning_rate: found {adapt.learning_rate:g}; usual are {low:g} to {high:g}, "
            "the paper uses 0.0003"
        )
    examples = _training_examples(recipe)
    if adapt.steps is None and examples is None:
        return
    steps = adapt.total_steps(examples or 0)
    if adapt.warmup_steps >= steps:
        yield (
            f"adapt.warmup_steps: found {adapt.warmup_steps}; training has {steps} steps, so the "
            f"learning rate never reaches {adapt.learning_rate:g}; a tenth of the steps is usual"
        )
    if examples:
        epochs = steps * adapt.batch * adapt.accumulation / examples
        yield from _epoch_doubts("steps" if adapt.steps else "epochs", steps, epochs, examples)


def _epoch_doubts(field: str, steps: int, epochs: float, examples: int) -> Iterator[str]:
    if epochs < MIN_EPOCHS:
        yield (
            f"adapt.{field}: found {steps} steps; they use {epochs:.1%} of the {examples} training "
            f"examples, less than {MIN_EPOCHS:.0%}; raise adapt.{field} or adapt.batch"
        )
    elif epochs > MAX_EPOCHS:
        yield (
            f"adapt.{field}: found {steps} steps; they use each of the {examples} training "
            f"examples {epochs:.0f} times, more than {MAX_EPOCHS:.0f}; lower adapt.{field}, or "
            "check that the data is complete"
        )


def _training_examples(recipe: Recipe) -> int | None:
    """Return the number of training rows; None if unknown: on the hub, packed, or missing files."""
    task = recipe.task
    if isinstance(task, Chat) and task.packing:
        return None
    if not all(file.is_file() for file in data_files(recipe, "train")):
        return None
    count = count_examples(recipe)
    return None if count is None else max(0, count - recipe.set_aside)


def find_calibration_doubts(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield a warning if a Hessian cannot have full rank: fewer tokens than inputs of a Linear."""
    config = recipe.calibration
    tokens = config.samples * config.sequence_length
    name, (_, inputs) = max(layout.linears.items(), key=lambda linear: linear[1][1])
    factored = recipe.quantize.method == "gptq" or recipe.sparsify.method == "sparsegpt"
    if factored and tokens < inputs:
        yield (
            f"calibration.samples: found {config.samples}; of at most {config.sequence_length} "
            f"tokens each, these are {tokens} tokens, but the Hessian of {name} needs {inputs}, "
            "one per input; raise calibration.samples or calibration.sequence_length"
        )
