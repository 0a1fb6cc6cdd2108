"""Peak resident bytes of a pass, from shapes, the data and what a library keeps, and whether this
machine has them."""

from math import prod

from sqft_export.errors import HostError
from sqft_export.measure.batches import MAX_BATCH_ROWS, MAX_CACHE_TOKENS, MAX_LOGIT_BYTES
from sqft_export.plan.disk import adapter_bytes, predict_bytes
from sqft_export.plan.layout import Layout
from sqft_export.plan.workload import Workload, calibration_tokens, checked_tokens
from sqft_export.recipe.passes import runs_on_cpu
from sqft_export.recipe.schema import Recipe, Reconstruct
from sqft_export.run.device import device_memory, device_name, device_of
from sqft_export.run.host import FLOAT32_MEMORY_SHARE, allowed_processors, size_text
from sqft_export.run.limits import free_memory
from sqft_export.run.threads import MAX_THREADS

LONG = 2.0  # times the mean, the longest batch of a training
KEPT, KEPT_LOGITS = 1.0, 3.0  # times an input or output of a Linear and the logits are kept
KEYS = 0.5  # of the width of a model, a key or a value; fewer heads share them
MAPPED = 2**28  # bytes of files that a pass has mapped and the system has not taken back
FIXED_MEMORY = 0.65 * 2**30
LOGITS = 2**27  # bytes of what search keeps


def predict_memory(recipe: Recipe, layout: Layout, workload: Workload) -> dict[str, float]:
    """Peak resident bytes of every pass, and of the processes it starts."""
    written = predict_bytes(recipe, layout)
    block = 4 * layout.weights / layout.blocks
    largest = 4 * max(map(prod, layout.linears.values()))
    widest = max(inputs for _, inputs in layout.linears.values())
    activations = 4 * calibration_tokens(recipe, workload) * widest
    outer, whole = 4 * layout.others, layout.weights + layout.others
    quantize, gptq = recipe.quantize, recipe.quantize.method == "gptq"
    exported = max((written[f"export-{name}"] for name in recipe.export.targets), default=0)
    deployed = exported / (1 + recipe.export.sparse_files)
    loaded = layout.width * whole + layout.weights / 8
    # The tuned model runs once, for what it computed with: a weight at a time is digested.
    tuned = loaded + outer + 3 * largest + 2 * adapter_bytes(recipe, layout)
    cached = tuned + _cached_weights(layout, LOGITS + tuned)
    in_float = max(_torch_rows(recipe, layout), cached * _has_tuned_row(recipe))
    of_pass = {
        "sparsify": MAPPED + block + 3 * largest + activations * recipe.sparsify.calibrates,
        "reconstruct": _reconstruction_bytes(recipe.sparsify.reconstruct, recipe, layout, workload),
        "quantize": max(
            MAPPED + block + 2 * largest + 4 * widest**2 * gptq + activations * quantize.calibrates,
            _reconstruction_bytes(recipe.quantize.reconstruct, recipe, layout, workload),
        ),
        "search": LOGITS + (cached if recipe.search.evaluates else tuned),
        "merge": 4 * largest + 2**29,
        "export-openvino": deployed,
        "export-onnx": MAPPED + 2 * largest + outer,
        "export-gguf": MAPPED + largest,
        "verify": _compared(recipe, layout, workload) + 2 * deployed + _in_llama_cpp(recipe, whole),
        "benchmark": max(deployed, in_float) + MAX_LOGIT_BYTES + _cached(recipe, layout, workload),
    }
    of_pass["baselines"] = of_pass["merge"]
    if recipe.adapt is None:  # verify runs what was compressed, as search does what was tuned
        of_pass["verify"] = max(of_pass["verify"], of_pass["search"])
    else:
        in_training = _activations(recipe, layout, workload)
        in_training += outer if recipe.adapt.precision == "float32" else 0
        of_pass["adapt"] = loaded + in_training + 5 * written["adapt"] + 4 * largest
        of_pass["teacher"] = of_pass["adapt"]
    return {name: FIXED_MEMORY + of_pass.get(name, 0) for name in written}


def check_memory(recipe: Recipe, layout: Layout, workload: Workload, passes: list[str]) -> None:
    """Refuse passes that this machine's free memory, or its accelerator's, can't hold.

    :raises HostError: with the pass, bytes needed and free.
    """
    free = free_memory()
    needed = {
        name: size
        for name, size in predict_memory(recipe, layout, workload).items()
        if name in passes
    }
    _require_memory(recipe, "memory", needed, free)
    device = device_of(recipe.device)
    on_device = device_memory(device)
    if on_device is not None:
        there = accelerator_bytes(recipe, needed, list(needed))
        _require_memory(recipe, f"memory of {device_name(device)}", there, on_device)


def accelerator_bytes(
    recipe: Recipe, memory: dict[str, float], passes: list[str]
) -> dict[str, float]:
    """Bytes that passes need on the accelerator: what they hold on the CPU without one, but for
    imports."""
    return {name: memory[name] - FIXED_MEMORY for name in passes if not runs_on_cpu(name, recipe)}


def _require_memory(recipe: Recipe, place: str, needed: dict[str, float], free: int) -> None:
    worst = max(needed, key=needed.__getitem__, default=None)
    if worst is not None and needed[worst] > free:
        way_out = "" if place == "memory" else "; device=cpu computes in the host's memory"
        raise HostError(
            f"{recipe.file}: {place}: {worst} needs {size_text(needed[worst])}, "
            f"{size_text(free)} are free{way_out}"
        )


def _activations(recipe: Recipe, layout: Layout, workload: Workload) -> float:
    """Bytes that a training step keeps for backward, logits included."""
    config = recipe.training
    tokens = config.batch * min(LONG * workload.example, recipe.task.sequence_length)
    vocabulary, width = layout.embedding
    of_block = sum(sum(shape) for shape in layout.linears.values()) / layout.blocks
    kept = (
        layout.blocks * width + of_block
        if config.gradient_checkpointing
        else (layout.blocks * of_block)
    )
    size = 4 if config.precision == "float32" else 2
    return tokens * (KEPT * size * kept + 4 * KEPT_LOGITS * vocabulary)


def _torch_rows(recipe: Recipe, layout: Layout) -> float:
    """Bytes of a torch row: float32 where there is room, else what its files take."""
    whole = layout.weights + layout.others
    if not recipe.benchmark.baselines:
        return 0
    return 4 * whole if 4 * whole <= FLOAT32_MEMORY_SHARE * free_memory() else layout.width * whole


def _has_tuned_row(recipe: Recipe) -> bool:
    return recipe.adapt is not None and "adapted" in recipe.benchmark.baselines


def _cached_weights(layout: Layout, taken: float) -> float:
    """Bytes of the effective weights that a tuned, unmerged model keeps where memory holds them.

    :param taken: bytes of all else, so that the cache never exceeds what is free.
    """
    size = 4 * layout.weights
    return size if size <= FLOAT32_MEMORY_SHARE * (free_memory() - FIXED_MEMORY - taken) else 0


def _in_llama_cpp(recipe: Recipe, weights: int) -> float:
    """Bytes of the float32 copy that a GGUF file is compared by, where there is room for one."""
    fits = 4 * weights <= FLOAT32_MEMORY_SHARE * free_memory()
    return 4 * weights if "gguf" in recipe.export.targets and fits else 0


def _compared(recipe: Recipe, layout: Layout, workload: Workload) -> float:
    """Bytes of layers at once, and of the logits of torch and of a runtime in both of its modes."""
    layers = min(MAX_THREADS, allowed_processors()) * max(map(prod, layout.linears.values()))
    vocabulary, _ = layout.embedding
    return 4 * layers + 3 * 4 * vocabulary * checked_tokens(recipe, workload)


def _cached(recipe: Recipe, layout: Layout, workload: Workload) -> float:
    """Bytes of the keys and values of a batch, in float32."""
    _, width = layout.embedding
    rows = min(MAX_BATCH_ROWS, recipe.benchmark.items)
    most = workload.prompt + getattr(recipe.task, "max_new_tokens", 0) if workload.answer else 0
    return min(MAX_CACHE_TOKENS, rows * most) * 2 * 4 * width * layout.blocks * KEYS


def _reconstruction_bytes(
    config: Reconstruct | None, recipe: Recipe, layout: Layout, workload: Workload
) -> float:
    """Two blocks, gradients and moments of one and what it is in the step at hand, hidden states of
    both and targets, and what a step keeps for backward."""
    if config is None:
        return 0
    _, width = layout.embedding
    hidden = 4 * calibration_tokens(recipe, workload) * width
    inside = sum(sum(shape) for shape in layout.linears.values()) / layout.blocks
    drawn = min(config.batch, recipe.calibration.samples) / recipe.calibration.samples
    kept = 4 * KEPT * drawn * calibration_tokens(recipe, workload) * inside
    return MAPPED + 8 * 4 * layout.weights / layout.blocks + 5 * hidden + kept
