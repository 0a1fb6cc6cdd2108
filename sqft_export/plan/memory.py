"""Predicted peak memory of each pass, and the check against free memory.

Peaks follow from shapes, from the data, and from constants for the memory that libraries hold.
"""

from math import prod

from sqft_export.errors import HostError
from sqft_export.machine.device import device_memory, device_name, device_of
from sqft_export.machine.host import (
    FLOAT32_MEMORY_SHARE,
    allowed_processors,
    float32_fits,
    size_text,
)
from sqft_export.machine.limits import free_memory
from sqft_export.machine.threads import MAX_THREADS
from sqft_export.measure.batches import MAX_BATCH_ROWS, MAX_CACHE_TOKENS, MAX_LOGIT_BYTES
from sqft_export.plan.disk import adapter_bytes, predict_bytes
from sqft_export.plan.layout import Layout, group_sizes
from sqft_export.plan.workload import Workload, calibration_tokens, checked_tokens
from sqft_export.probes.document import LONG_CACHE_BYTES, LONG_TOKENS
from sqft_export.recipe.passes import runs_on_cpu
from sqft_export.recipe.schema import Recipe, Reconstruct

LONGEST_TO_MEAN = 2.0  # tokens of the longest training batch, relative to the mean
ACTIVATION_COPIES = 1.0  # copies of every Linear's input and output that backward needs
LOGIT_COPIES = 3.0  # float32 copies of the logits that backward needs
KEY_VALUE_WIDTH_RATIO = 0.5  # width of keys relative to the model's; several heads share one
MAPPED_BYTES = 2**28  # resident pages of mapped files that the system has not freed yet
FIXED_MEMORY = 0.65 * 2**30  # bytes of the imported libraries
SEARCH_BYTES = 2**27  # logits and other data of search


def predict_memory(
    recipe: Recipe, layout: Layout, workload: Workload, processes: int = 1
) -> dict[str, float]:
    """Predict the peak resident bytes of every pass, including the processes that it starts.

    :param processes: of a launcher; the bytes are those of each. They split the calibration
        samples, and train with FSDP2.
    """
    # Variables are bytes, except ``whole``: a number of weights. ``largest`` and ``outer`` are
    # float32 copies of the largest Linear, and of all tensors that are no Linears of the decoder.
    artifacts = predict_bytes(recipe, layout)
    largest = 4 * max(map(prod, layout.linears.values()))
    activations = _calibration_bytes(recipe, layout, workload)
    outer, whole = 4 * (layout.others - layout.tables), layout.weights + layout.others
    data = recipe, layout, workload
    deployed = _deployed_bytes(recipe, artifacts)
    tuned = _tuned_model_bytes(recipe, layout, largest)
    with_cache = tuned + _weight_cache_bytes(layout, SEARCH_BYTES + tuned)
    torch_row = max(_torch_row_bytes(recipe, layout), with_cache * _has_tuned_row(recipe))
    peaks = {
        **_compression_bytes(*data, largest, processes),
        "search": SEARCH_BYTES + (with_cache if recipe.search.evaluates else tuned),
        "merge": max(4 * largest + 2**29, _probe_bytes(layout, outer) + _kept_bytes(whole)),
        "export-openvino": deployed,
        **dict.fromkeys(("export-onnx", "export-web"), MAPPED_BYTES + 2 * largest + outer),
        "export-gguf": MAPPED_BYTES + largest + _stacked_bytes(layout),
        "verify": _comparison_bytes(*data) + 2 * deployed + _gguf_copy_bytes(recipe, whole),
        "benchmark": max(deployed, torch_row) + MAX_LOGIT_BYTES + _kv_cache_bytes(*data),
    }
    peaks["baselines"] = peaks["merge"]
    peaks |= _peer_bytes(layout, activations, max(deployed, peaks["export-onnx"]))
    if recipe.adapt is None:  # verify runs the model itself, as search does
        peaks["verify"] = max(peaks["verify"], peaks["search"])
    else:
        training = _trained_model_bytes(recipe, layout, artifacts["adapt"], processes)
        training += 4 * largest + _activation_bytes(*data)
        training += outer * (recipe.adapt.precision == "float32")
        peaks |= {"adapt": training, "teacher": training}
    return {n: FIXED_MEMORY + peaks.get(n, 0) + _table_bytes(layout, n) for n in artifacts}


def _compression_bytes(
    recipe: Recipe, layout: Layout, workload: Workload, largest: int, processes: int
) -> dict[str, float]:
    """Return the bytes of the passes that walk over the blocks.

    :param largest: bytes of the largest Linear in float32.
    :param processes: processes that split the calibration samples.
    """
    quantize, data = recipe.quantize, (recipe, layout, workload)
    samples = _calibration_bytes(*data) / (1 if layout.family.experts else processes)
    widest = max(inputs for _, inputs in layout.linears.values())
    hessians = 4 * widest**2 * (quantize.method == "gptq")
    block = MAPPED_BYTES + _block_bytes(layout)
    return {
        "sparsify": block + 3 * largest + samples * recipe.sparsify.calibrates,
        "reconstruct": _reconstruction_bytes(recipe.sparsify.reconstruct, *data),
        "quantize": max(
            block + 2 * largest + hessians + samples * quantize.calibrates,
            _reconstruction_bytes(quantize.reconstruct, *data),
        ),
    }


def _table_bytes(layout: Layout, name: str) -> float:
    """Return the bytes that token tables besides the embedding add to a pass.

    A table is read and rounded in chunks of rows. The copies are those of its result: floats of the
    checkpoint's dtype, float32, or codes in the layout of a runtime.
    """
    float32 = dict.fromkeys(("merge", "verify", "adapt", "teacher"), 4)
    copies = {"quantize": layout.width, "export-onnx": 2, "export-gguf": 3} | float32
    return float(layout.tables * copies.get(name, 0))


def _deployed_bytes(recipe: Recipe, artifacts: dict[str, int]) -> float:
    """Return the bytes of the largest deployment, without its packed copy."""
    exported = max((artifacts[f"export-{name}"] for name in recipe.export.targets), default=0)
    return exported / (1 + recipe.export.sparse_files)


def _peer_bytes(layout: Layout, activations: float, exported: float) -> dict[str, float]:
    """Return the bytes of the passes that quantize the dense LoRA.

    :param activations: bytes of the calibration samples in a block.
    :param exported: bytes of the largest export.
    """
    block, largest = 4 * layout.weights / layout.blocks, 4 * max(map(prod, layout.linears.values()))
    widest = max(inputs for _, inputs in layout.linears.values())
    walked = MAPPED_BYTES + block + 3 * largest + activations
    return {
        "peers-grid": max(walked + 4 * widest**2, exported),
        "peers-gguf": walked,
        "peers-nncf": walked + 3 * 4 * (layout.weights + layout.others),  # copies that NNCF holds
    }


def _probe_bytes(layout: Layout, outer: float) -> float:
    """Return the bytes of the reference that makes the self-test: a module, cache, activations."""
    _, width = layout.embedding
    cache = 2 * 4 * LONG_TOKENS * width * layout.blocks * KEY_VALUE_WIDTH_RATIO
    inside = 4 * LONG_TOKENS * sum(sum(shape) for shape in layout.linears.values()) / layout.blocks
    return outer / 2 + min(LONG_CACHE_BYTES, cache) + inside + MAPPED_BYTES


def _calibration_bytes(recipe: Recipe, layout: Layout, workload: Workload) -> float:
    """Return the bytes of the calibration samples' activations, in float32.

    A mixture of experts also keeps the recorded inputs and the outputs of a block's experts.
    """
    widest = max(inputs for _, inputs in layout.linears.values())
    recorded = 2 * layout.embedding[1] if layout.family.experts else 0
    return 4 * calibration_tokens(recipe, workload) * (widest + recorded)


def _block_bytes(layout: Layout) -> float:
    """Return the float32 bytes of a block; of experts, one is in memory at a time."""
    shapes = layout.linears.items()
    experts = {n: prod(shape) for n, shape in shapes if ".experts." in n}
    one = sum(size for n, size in experts.items() if ".experts.0." in n) / layout.blocks
    return 4 * ((layout.weights - sum(experts.values())) / layout.blocks + one)


def _stacked_bytes(layout: Layout) -> float:
    """Return the bytes of the codes of all experts of one Linear, which GGUF stores together."""
    sizes = [prod(shape) for name, shape in layout.linears.items() if ".experts." in name]
    return sum(sizes) / layout.blocks / 3


def check_memory(recipe: Recipe, layout: Layout, workload: Workload, passes: list[str]) -> None:
    """Refuse passes that need more than the free memory of this machine or its accelerator.

    :raises HostError: if one does; the message has the pass, the bytes needed and the bytes free.
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
        on_accelerator = accelerator_bytes(recipe, needed, list(needed))
        _require_memory(recipe, f"memory of {device_name(device)}", on_accelerator, on_device)


def accelerator_bytes(
    recipe: Recipe, memory: dict[str, float], passes: list[str]
) -> dict[str, float]:
    """Return the bytes that passes need on the accelerator.

    They are the bytes that the pass needs without an accelerator, minus the imported libraries.
    """
    return {name: memory[name] - FIXED_MEMORY for name in passes if not runs_on_cpu(name, recipe)}


def _require_memory(recipe: Recipe, resource: str, needed: dict[str, float], free: int) -> None:
    largest = max(needed, key=needed.__getitem__, default=None)
    if largest is not None and needed[largest] > free:
        advice = "" if resource == "memory" else "; device=cpu computes in the host's memory"
        raise HostError(
            f"{recipe.file}: {resource}: {largest} needs {size_text(needed[largest])}, "
            f"{size_text(free)} are free{advice}"
        )


def _torch_model_bytes(layout: Layout) -> float:
    """Return the bytes of a model in torch: the checkpoint's dtype, and one mask bit per weight."""
    return layout.width * (layout.weights + layout.others) + layout.weights / 8


def _trained_model_bytes(recipe: Recipe, layout: Layout, adapter: float, processes: int) -> float:
    """Return the bytes of the model in training: frozen weights, adapter, gradients and moments.

    FSDP2 spreads parameters over the processes. Each process also holds what it gathers, which is
    two blocks and all tensors outside the blocks, and all masks and grids, which are buffers.

    :param adapter: bytes of the adapter in float32.
    """
    groups = group_sizes(recipe, layout) if recipe.quantize.method != "none" else {}
    grids = 3 * sum(prod(layout.linears[name]) / size for name, size in groups.items())
    whole = _torch_model_bytes(layout) + 5 * adapter
    buffers = layout.weights / 8
    if processes == 1:
        return whole + grids
    gathered = layout.width * (2 * layout.weights / layout.blocks + layout.others)
    return (whole - buffers) / processes + buffers + grids + gathered


def _tuned_model_bytes(recipe: Recipe, layout: Layout, largest: int) -> float:
    """Return the bytes of the tuned, unmerged model in torch while its operands are captured.

    Embedding, head and norms have float32 copies. The weights are hashed one by one.

    :param largest: bytes of the largest Linear in float32.
    """
    copies = 4 * layout.others + 3 * largest
    return _torch_model_bytes(layout) + copies + 2 * adapter_bytes(recipe, layout)


def _activation_bytes(recipe: Recipe, layout: Layout, workload: Workload) -> float:
    """Return the bytes that a training step holds for backward, including logits."""
    config = recipe.training
    tokens = config.batch * min(LONGEST_TO_MEAN * workload.example, recipe.task.sequence_length)
    vocabulary, width = layout.embedding
    # Numbers per token: inputs and outputs of all Linears of a block.
    per_block = sum(sum(shape) for shape in layout.linears.values()) / layout.blocks
    checkpointed = layout.blocks * width + per_block
    per_token = checkpointed if config.gradient_checkpointing else layout.blocks * per_block
    itemsize = 4 if config.precision == "float32" else 2
    return tokens * (ACTIVATION_COPIES * itemsize * per_token + 4 * LOGIT_COPIES * vocabulary)


def _torch_row_bytes(recipe: Recipe, layout: Layout) -> float:
    """Return the bytes of a benchmark row in torch; 0 without baselines.

    The weights are in float32 if that fits, else in the dtype of the checkpoint.
    """
    whole = layout.weights + layout.others
    if not recipe.benchmark.baselines:
        return 0
    return _kept_bytes(whole) or layout.width * whole


def _has_tuned_row(recipe: Recipe) -> bool:
    """Return whether the benchmark measures the tuned, unmerged model."""
    return recipe.adapt is not None and "adapted" in recipe.benchmark.baselines


def _weight_cache_bytes(layout: Layout, other_bytes: float) -> float:
    """Return the bytes of the cached effective weights of a tuned, unmerged model; 0 if too large.

    :param other_bytes: bytes of everything else; the cache gets a share of the rest.
    """
    size, free = 4 * layout.weights, free_memory() - FIXED_MEMORY - other_bytes
    return size if size <= FLOAT32_MEMORY_SHARE * free else 0


def _kept_bytes(weights: int) -> float:
    """Return the bytes of a model that is kept in memory as float32; 0 if it is too large."""
    return 4 * weights if float32_fits(weights) else 0


def _gguf_copy_bytes(recipe: Recipe, weights: int) -> float:
    """Return the bytes of the float32 copy that verify makes of a GGUF file; 0 if too large."""
    return _kept_bytes(weights) if "gguf" in recipe.export.targets else 0


def _comparison_bytes(recipe: Recipe, layout: Layout, workload: Workload) -> float:
    """Return the bytes of the layers compared at once, and of three sets of logits.

    The logits are those of torch and those of a runtime in both of its modes.
    """
    layers = min(MAX_THREADS, allowed_processors()) * max(map(prod, layout.linears.values()))
    vocabulary, _ = layout.embedding
    return 4 * layers + 3 * 4 * vocabulary * checked_tokens(recipe, workload)


def _kv_cache_bytes(recipe: Recipe, layout: Layout, workload: Workload) -> float:
    """Return the bytes of the keys and values of a batch, in float32."""
    _, width = layout.embedding
    rows = min(MAX_BATCH_ROWS, recipe.benchmark.items)
    new_tokens = getattr(recipe.task, "max_new_tokens", 0)
    row_tokens = workload.prompt + new_tokens if workload.answer else 0
    tokens = min(MAX_CACHE_TOKENS, rows * row_tokens)
    return tokens * 2 * 4 * width * layout.blocks * KEY_VALUE_WIDTH_RATIO


def _reconstruction_bytes(
    config: Reconstruct | None, recipe: Recipe, layout: Layout, workload: Workload
) -> float:
    """Return the bytes of a block's reconstruction; 0 without one.

    In units of a float32 block: both blocks with their stored weights, and gradients, two moments
    and current weights of the trained one (8 copies). In units of the hidden states: inputs and
    outputs of both blocks, and the targets (5 copies). Activations of a step are added.
    """
    if config is None:
        return 0
    _, width = layout.embedding
    hidden = 4 * calibration_tokens(recipe, workload) * width
    per_token = sum(sum(shape) for shape in layout.linears.values()) / layout.blocks
    batch_share = min(config.batch, recipe.calibration.samples) / recipe.calibration.samples
    batch_tokens = batch_share * calibration_tokens(recipe, workload)
    activations = 4 * ACTIVATION_COPIES * batch_tokens * per_token
    return MAPPED_BYTES + 8 * 4 * layout.weights / layout.blocks + 5 * hidden + activations
