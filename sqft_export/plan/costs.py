"""What a pass will cost on this machine: seconds and peak memory, from counted work.

Work is counted in three kinds: multiplications of matrix products, passes of an elementwise
operation over a weight, bytes written. How fast the machine does each is measured for a second.
How many elementwise passes each of ours comes to, what a library takes whatever the model, and what
it keeps in memory are constants fitted to `benchmarks/real_size.py`, which compares both.
"""

import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path

import psutil

from sqft_export.errors import HostError
from sqft_export.model.checkpoint import count_blocks
from sqft_export.model.families import adapted
from sqft_export.plan.layout import Layout, group_sizes
from sqft_export.plan.speeds import Speeds, nearest_existing
from sqft_export.recipe.passes import pass_names
from sqft_export.recipe.schema import Recipe
from sqft_export.run.host import size_text


def predict_bytes(recipe: Recipe, layout: Layout) -> dict[str, int]:
    """Bytes that each pass will write, from shapes and bit widths."""
    stored = (layout.weights + layout.others) * layout.width
    masks = layout.weights // 8
    groups = group_sizes(recipe, layout)
    targets, _ = adapted(layout.family, recipe.adapt.target_modules, None)
    scales = sum(prod(shape) // groups[name] for name, shape in layout.linears.items())
    adapter = 4 * sum(
        recipe.adapt.max_rank * (outputs + inputs)
        for name, (outputs, inputs) in layout.linears.items()
        if name.rsplit(".", 1)[1] in targets
    )
    quantized = recipe.quantize.method != "none"
    # A scale is two bytes, a zero point at most one.
    codes = layout.weights * recipe.quantize.bits // 8 + 3 * scales if quantized else 0
    merged = codes + layout.others * layout.width if quantized else stored
    deployed = codes + 4 * layout.others if quantized else 4 * (layout.weights + layout.others)
    if recipe.export.sparse_files:
        deployed *= 2  # at most: a packed copy is never larger
    predicted = {
        "sparsify": stored + masks,
        "quantize": stored + 3 * scales,
        "adapt": adapter,
        "search": adapter,
        "merge": merged + masks,
        "export-openvino": deployed,
        "export-onnx": deployed,
        "teacher": stored,
        "baselines": merged,
    }
    return {name: predicted.get(name, 2**20) for name in pass_names(recipe)}


def check_disk(recipe: Recipe, layout: Layout, root: Path, passes: list[str]) -> None:
    """Refuse passes that the disk can't hold.

    :raises HostError: with bytes needed and free.
    """
    needed, free = disk_bytes(recipe, layout, root, passes)
    if free < needed:
        raise HostError(
            f"{recipe.file}: disk: {size_text(needed)} needed in {root}, {size_text(free)} free"
        )


def disk_bytes(recipe: Recipe, layout: Layout, root: Path, passes: list[str]) -> tuple[int, int]:
    """Bytes that passes need at most, scratch included, and bytes free."""
    written = predict_bytes(recipe, layout)
    # An exporter's traced copy in float32, and what verify and benchmark inflate, come and go.
    scratch = {
        **{
            f"export-{name}": 4 * (layout.weights + layout.others) for name in recipe.export.targets
        },
        "verify": 2
        * max((written.get(f"export-{n}", 0) for n in recipe.export.targets), default=0),
    }
    scratch["benchmark"] = scratch["verify"]
    transient = max((scratch.get(name, 0) for name in passes), default=0)
    needed = sum(written.get(name, 0) for name in passes) + transient
    return needed, shutil.disk_usage(nearest_existing(root)).free


GIB = 2**30


def predict_seconds(
    recipe: Recipe, layout: Layout, machine: Speeds, examples: int | None
) -> dict[str, float | None]:
    """Of every pass of the recipe; None where they depend on data that is not here.

    :param examples: to train on, which steps are counted from where the recipe gives epochs.
    """
    written, found = predict_bytes(recipe, layout), dict[str, float | None]()
    for name, size in written.items():
        work = _work(name, recipe, layout, examples)
        found[name] = (
            None
            if work is None
            else (
                FIXED_SECONDS.get(name, 1)
                + work.flops / machine.flops
                + work.elements / machine.elements
                + size / machine.disk
            )
        )
    return found


@dataclass(frozen=True)
class _Work:
    """Multiplications and additions in matrix products, and elements of elementwise passes."""

    flops: float = 0
    elements: float = 0


# Elementwise passes over every decoder weight, in float32, that a pass comes to; of adapt, a step.
ELEMENTWISE = {
    "sparsify": 24,
    "quantize": 37,
    "adapt": 16,
    "teacher": 16,
    "search": 40,
    "merge": 7,
    "baselines": 7,
    "export-openvino": 8.5,
    "export-onnx": 6,
    "verify": 21,
}
# The same over embedding and head, which runtimes and torch read as floats.
ELEMENTWISE_OUTER = {"export-openvino": 18, "export-onnx": 4, "verify": 44}
# Whatever the model: imports, tracing, a runtime's start.
FIXED_SECONDS = {
    "search": 1.0,
    "export-openvino": 2.0,
    "export-onnx": 0.5,
    "verify": 4.0,
    "benchmark": 3.0,
    "report": 0.5,
}
MAPPED = 2**28  # bytes of files that a pass has mapped and the system has not taken back
FIXED_MEMORY = 0.65 * GIB
LOGITS = 2**27  # bytes of what search keeps and verify compares


def _work(name: str, recipe: Recipe, layout: Layout, examples: int | None) -> _Work | None:
    forward = 2 * layout.weights  # of a token
    elements = ELEMENTWISE.get(name, 0) * layout.weights
    elements += ELEMENTWISE_OUTER.get(name, 0) * layout.others
    if name == "sparsify":
        return _Work(2 * forward * _calibration_tokens(recipe), elements)
    if name == "quantize":
        tokens = _calibration_tokens(recipe)
        solved = _solver(layout, tokens) if recipe.quantize.method == "gptq" else 0
        return _Work(2 * forward * tokens + solved, elements)
    if name in ("adapt", "teacher"):
        config = recipe.adapt
        if config.steps is None and examples is None:
            return None
        steps = config.total_steps(examples or 0)
        tokens = config.batch * config.accumulation * recipe.task.sequence_length
        # Forward, backward to the inputs and to the weights; the update is made twice.
        flops = 3 * forward * tokens + 4 * config.max_rank * layout.weights
        return _Work(steps * flops, steps * elements)
    if name in ("merge", "baselines"):
        return _Work(2 * recipe.adapt.max_rank * layout.weights, elements)
    if name in ("verify", "benchmark"):
        return _Work(_answers(name, recipe) * forward, elements)
    return _Work(0, elements)


def _calibration_tokens(recipe: Recipe) -> int:
    return recipe.calibration.samples * recipe.calibration.sequence_length


def _answers(name: str, recipe: Recipe) -> float:
    """Tokens that go through the model."""
    runtimes = len(recipe.export.targets) * (1 + recipe.export.sparse_files)
    length = recipe.task.sequence_length
    if name == "verify":
        checked = recipe.verify
        return 3 * runtimes * checked.prompts * (length + checked.new_tokens)
    asked = recipe.benchmark
    rows = runtimes + len(asked.baselines)
    # Timed as many times in every process, and warmed up once with either prompt.
    timed = asked.rounds * (asked.repeats + 2) * (asked.prompt_tokens + asked.new_tokens)
    generated = getattr(recipe.task, "max_new_tokens", 0)
    return rows * (asked.items * (2 * length + generated) + timed)


def _solver(layout: Layout, tokens: int) -> float:
    """Of GPTQ: sums, factors and updates; what stands together shares its inputs."""
    total, seen = 0.0, set()
    for name, (outputs, inputs) in layout.linears.items():
        shared = name.rpartition(".")[0], inputs
        if shared not in seen:
            seen.add(shared)
            total += 2 * tokens * inputs**2 + 2 / 3 * inputs**3
        total += outputs * inputs**2
    return total


def predict_memory(recipe: Recipe, layout: Layout) -> dict[str, float]:
    """Peak resident bytes of every pass, and of the processes it starts."""
    written = predict_bytes(recipe, layout)
    block = 4 * layout.weights / count_blocks(layout.linears, layout.family.blocks)
    largest = 4 * max(map(prod, layout.linears.values()))
    widest = max(inputs for _, inputs in layout.linears.values())
    activations = 4 * _calibration_tokens(recipe) * widest
    outer, whole = 4 * layout.others, layout.weights + layout.others
    gptq = recipe.quantize.method == "gptq"
    exported = max(written.get(f"export-{name}", 0) for name in ("openvino", "onnx"))
    deployed = exported / (1 + recipe.export.sparse_files)
    loaded = layout.width * whole + layout.weights / 8
    in_training = outer if recipe.adapt.precision == "float32" else 0
    in_float = 4 * whole if recipe.benchmark.baselines else 0
    of_pass = {
        "sparsify": MAPPED + block + 3 * largest + activations,
        "quantize": MAPPED + block + 2 * largest + 4 * widest**2 * gptq + activations,
        "adapt": loaded + in_training + 5 * written["adapt"] + 4 * largest,
        # The tuned model runs once, for what it computed with: a weight at a time is digested.
        "search": LOGITS + loaded + in_training + 3 * largest + 2 * written["adapt"],
        "merge": 4 * largest + 2**29,
        "export-openvino": deployed,
        "export-onnx": MAPPED + 2 * largest + outer,
        "verify": LOGITS + 2 * deployed,
        "benchmark": max(deployed, in_float),
    }
    of_pass |= {"teacher": of_pass["adapt"], "baselines": of_pass["merge"]}
    return {name: FIXED_MEMORY + of_pass.get(name, 0) for name in written}


def free_memory() -> int:
    """Bytes that can be taken without swapping."""
    return int(psutil.virtual_memory().available)


def check_memory(recipe: Recipe, layout: Layout, passes: list[str]) -> None:
    """Refuse passes that this machine's free memory can't hold.

    :raises HostError: with the pass, bytes needed and free.
    """
    free = free_memory()
    needed = {name: size for name, size in predict_memory(recipe, layout).items() if name in passes}
    worst = max(needed, key=needed.__getitem__, default=None)
    if worst is not None and needed[worst] > free:
        raise HostError(
            f"{recipe.file}: memory: {worst} needs {size_text(needed[worst])}, "
            f"{size_text(free)} are free"
        )
