"""What a pass will cost on this machine: seconds and peak memory, from counted work.

Work is counted in three kinds: multiplications of matrix products, passes of an elementwise
operation over a weight, bytes written. How fast the machine does each is measured for a second.
How many elementwise passes each of ours comes to, what a library takes whatever the model, and what
it keeps in memory are constants; `benchmarks/real_size.py` compares what they foretell with a run.
"""

import shutil
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import psutil

from sqft_export.errors import HostError
from sqft_export.measure.agreement import COMPARED
from sqft_export.measure.batches import CACHED, PASS_BYTES, ROWS
from sqft_export.model.families import adapted
from sqft_export.plan.layout import Layout, group_sizes
from sqft_export.plan.speeds import Speed, Speeds, nearest_existing
from sqft_export.plan.workload import Workload
from sqft_export.recipe.passes import pass_names
from sqft_export.recipe.schema import Recipe, Reconstruct
from sqft_export.run.host import FLOAT32_ROOM, allowed_processors, size_text
from sqft_export.run.threads import MOST


def predict_bytes(recipe: Recipe, layout: Layout) -> dict[str, int]:
    """Bytes that each pass will write, from shapes and bit widths."""
    stored = (layout.weights + layout.others) * layout.width
    masks = layout.weights // 8
    groups = group_sizes(recipe, layout)
    scales = sum(prod(shape) // groups[name] for name, shape in layout.linears.items())
    adapter = _adapter_bytes(recipe, layout)
    quantized = recipe.quantize.method != "none"
    # A scale is two bytes, a zero point at most one.
    codes = layout.weights * max(4, recipe.quantize.bits) // 8 + 3 * scales if quantized else 0
    merged = codes + layout.others * layout.width if quantized else stored
    deployed = codes + 4 * layout.others if quantized else 4 * (layout.weights + layout.others)
    if recipe.export.sparse_files:
        deployed *= 2  # at most: a packed copy is never larger
    predicted = {
        "sparsify": stored + masks,
        "reconstruct": 2 * stored,  # blocks that are done, and the whole of them
        "quantize": stored * (3 if recipe.quantize.reconstruct else 1) + 3 * scales,
        "adapt": adapter,
        "search": adapter,
        "merge": merged + masks,
        "export-openvino": deployed,
        "export-onnx": deployed,
        "export-gguf": deployed,
        "teacher": stored,
        "baselines": merged,
    }
    return {name: predicted.get(name, 2**20) for name in pass_names(recipe)}


def _adapter_bytes(recipe: Recipe, layout: Layout) -> int:
    if recipe.adapt is None:
        return 0
    targets, _ = adapted(layout.family, recipe.adapt.target_modules, None)
    linears = [sum(s) for n, s in layout.linears.items() if n.rsplit(".", 1)[1] in targets]
    return 4 * recipe.adapt.max_rank * sum(linears)


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
    if "gguf" in recipe.export.targets:  # its numbers as float32
        scratch["verify"] += 4 * (layout.weights + layout.others)
    transient = max((scratch.get(name, 0) for name in passes), default=0)
    needed = sum(written.get(name, 0) for name in passes) + transient
    return needed, shutil.disk_usage(nearest_existing(root)).free


GIB = 2**30
FLOAT32 = "float32"


def predict_seconds(
    recipe: Recipe, layout: Layout, machine: Speeds, workload: Workload
) -> dict[str, float | None]:
    """Of every pass of the recipe; None where they depend on data that is not here."""
    found = dict[str, float | None]()
    for name, size in predict_bytes(recipe, layout).items():
        computed = _seconds(name, recipe, layout, workload, machine)
        fixed = FIXED_SECONDS.get(name, 1) + size / machine.disk
        if machine.device != machine.cpu and not on_cpu(name, recipe):
            fixed += ACCELERATOR_SECONDS
        found[name] = None if computed is None else fixed + computed
    if "benchmark" in found and (minutes := recipe.benchmark.minutes):
        found["benchmark"] = 60 * minutes
    return found


def on_cpu(name: str, recipe: Recipe) -> bool:
    """Whether nothing of a pass runs on an accelerator."""
    return name in ON_CPU or (name == "quantize" and recipe.quantize.method == "nncf")


@dataclass(frozen=True)
class _Work:
    """Multiplications and additions in matrix products by dtype, elements of elementwise passes,
    and what takes its time on any machine."""

    flops: dict[str, float] = field(default_factory=dict)
    elements: float = 0
    seconds: float = 0

    def __add__(self, other: "_Work") -> "_Work":
        dtypes = self.flops | other.flops
        flops = {d: self.flops.get(d, 0) + other.flops.get(d, 0) for d in dtypes}
        return _Work(flops, self.elements + other.elements, self.seconds + other.seconds)

    def on(self, speed: Speed) -> float:
        """Seconds it takes there."""
        products = sum(flops / speed.products[dtype] for dtype, flops in self.flops.items())
        return self.seconds + products + self.elements / speed.elements


ON_CPU = ("merge", "baselines", "export-openvino", "export-onnx", "export-gguf", "report")
# Elementwise passes over every decoder weight, in float32, that a pass comes to.
ELEMENTWISE = {
    "sparsify": 95,
    "quantize": 52,
    "adapt": 24,
    "teacher": 24,
    "search": 52,
    "merge": 22,
    "baselines": 22,
    "verify": 28,
}
# Passes of exporters and runtimes over what they write and load, and the same over embedding and
# head, which they and torch read as floats; by one thread, but for a share that all take part in.
ALONE = {"export-openvino": 12, "export-onnx": 19, "export-gguf": 21}
ALONE_OUTER = {"export-openvino": 125, "export-onnx": 48, "verify": 20}
SHARED = {"export-openvino": 0.5, "export-onnx": 0.5, "verify": 0.5}
# What verify does more of every deployment: passes of all threads and of one over decoder weights,
# of one over the others; seconds of it and of each of its blocks. A packed one is inflated and
# asked once.
CHECKED, CHECKED_ALONE, CHECKED_OUTER = 10, 18, 62
CHECKED_SECONDS, CHECKED_BLOCK = 3.0, 0.35
CHECKED_PACKED = 0.3
# A training step: passes over adapted weights, over logits, and over the hidden states of a block.
STEP_WEIGHTS, STEP_LOGITS, STEP_HIDDEN = 4.0, 10.0, 60.0
ADAM_WEIGHTS = 12.0  # a step of Adam: passes over all weights
# Of products in a step, of which many are narrow, over large ones.
STEP_EFFICIENCY = {FLOAT32: 0.6, "bfloat16": 0.5}
# Whatever the model: imports, tracing, a runtime's start.
FIXED_SECONDS = {
    "sparsify": 5.0,
    "adapt": 4.0,
    "teacher": 4.0,
    "search": 2.0,
    "merge": 1.5,
    "export-openvino": 4.0,
    "verify": 9.0,
}
ACCELERATOR_SECONDS = 1.5  # it starts, and its kernels are loaded
BLOCK_SECONDS = {"export-openvino": 0.45, "export-onnx": 0.15}  # a block is traced, or built
WORD_SECONDS = {"export-gguf": 5e-5}  # a word of the vocabulary is told
CALL_SECONDS = 1.5e-3  # a block called with a calibration sample, over products and weights read
COLUMN_SECONDS = {"gptq": 2.2e-4, "sparsegpt": 1.2e-4}  # a column, over its arithmetic
# A row of a benchmark: its process starts and loads; a token alone goes through a block.
ROW_SECONDS = {"torch": 13.0, "runtime": 2.3}
TOKEN_SECONDS = {"torch": 8e-4, "runtime": 2e-4}
STEP_BYTES = 12.0  # of memory that a multiply-add over an element moves
PADDED = 1.3  # tokens of a batch with those that fill it up
DECODED = 2.0  # a token that is generated in a batch, over one of a prompt
LONG = 2.0  # times the mean, the longest batch of a training
KEPT, KEPT_LOGITS = 1.0, 3.0  # times an input or output of a Linear and the logits are kept
KEYS = 0.5  # of the width of a model, a key or a value; fewer heads share them
MAPPED = 2**28  # bytes of files that a pass has mapped and the system has not taken back
FIXED_MEMORY = 0.65 * GIB
LOGITS = 2**27  # bytes of what search keeps
DAY = 24 * 3600.0
FEW_MINUTES = 30  # of a benchmark that is to fit a day


def _seconds(
    name: str, recipe: Recipe, layout: Layout, workload: Workload, machine: Speeds
) -> float | None:
    """Of what is counted, where it is done: files by one thread of the CPU, runtimes and digests by
    all of them."""
    elements = ELEMENTWISE.get(name, 0) * layout.weights
    if name in ("sparsify", "quantize"):
        work = _calibrated(name, recipe, layout, workload, elements)
        if name == "quantize" and (config := recipe.quantize.reconstruct):
            work += _reconstruction(config, recipe, layout, workload)
        return work.on(machine.cpu if on_cpu(name, recipe) else machine.device)
    if name == "reconstruct":
        work = _reconstruction(recipe.sparsify.reconstruct, recipe, layout, workload)
        return work.on(machine.device)
    if name in ("adapt", "teacher"):
        training = _training(recipe, layout, workload, machine.device)
        loaded = _Work({}, elements)
        return (training + loaded).on(machine.device) if training else None
    if name == "search":
        evaluated = _evaluations(recipe, layout, workload).on(machine.device)
        return _Work({}, elements).on(machine.cpu) + evaluated
    if name == "verify":
        return _verified(recipe, layout, workload, machine)
    if name == "benchmark":
        return _scoring(recipe, layout, workload, machine)
    if name in ("merge", "baselines"):
        rank = recipe.adapt.max_rank if recipe.adapt else 0
        return _Work({FLOAT32: 2 * rank * layout.weights}, elements).on(machine.cpu)
    return _gone_through(name, _exported(name, recipe, layout), machine)


def _gone_through(name: str, work: _Work, machine: Speeds) -> float:
    """Seconds of an exporter or a runtime, which goes through a part of it with one thread."""
    together = _Work({}, SHARED.get(name, 0) * work.elements)
    alone = replace(work, elements=work.elements - together.elements)
    return alone.on(machine.alone) + together.on(machine.cpu)


def _exported(name: str, recipe: Recipe, layout: Layout) -> _Work:
    words, _ = layout.embedding
    elements = ALONE.get(name, 0) * layout.weights + ALONE_OUTER.get(name, 0) * layout.others
    seconds = BLOCK_SECONDS.get(name, 0) * layout.blocks + WORD_SECONDS.get(name, 0) * words
    # Packed, each of its tensors is gone through again.
    times = 1 + (name == "export-gguf" and recipe.export.sparse_files)
    return _Work({}, times * elements, times * seconds)


def _calibrated(
    name: str, recipe: Recipe, layout: Layout, workload: Workload, elements: float
) -> _Work:
    """Blocks called with every sample twice, and columns rounded one by one."""
    method = recipe.sparsify.method if name == "sparsify" else recipe.quantize.method
    if method in ("magnitude", "rtn", "given"):
        return _Work({}, elements)
    tokens = _calibration_tokens(recipe, workload)
    flops, seconds = 4 * layout.weights * tokens, 0.0
    if method in COLUMN_SECONDS:
        flops += _solver(layout, tokens)
        columns = sum(inputs for _, inputs in layout.linears.values())
        seconds = COLUMN_SECONDS[method] * columns
    work = _Work({FLOAT32: flops}, elements, seconds)
    return work + _calls(2 * recipe.calibration.samples, layout)


def _calls(times: int, layout: Layout) -> _Work:
    """Every block called so often with one sample, over products: its weights are read."""
    elements = times * layout.weights * 4 / STEP_BYTES
    return _Work({}, elements, times * layout.blocks * CALL_SECONDS)


def _reconstruction(
    config: Reconstruct | None, recipe: Recipe, layout: Layout, workload: Workload
) -> _Work:
    """Forward and backward of every step, and five runs of the samples through a block or its
    dense one: for targets, errors before and after, and the inputs of the next."""
    assert config is not None
    tokens = _calibration_tokens(recipe, workload)
    drawn = min(config.batch, recipe.calibration.samples) / recipe.calibration.samples
    flops = 2 * layout.weights * tokens * (3 * config.steps * drawn + 5)
    work = _Work(
        {FLOAT32: flops / STEP_EFFICIENCY[FLOAT32]}, ADAM_WEIGHTS * config.steps * layout.weights
    )
    return work + _calls(5 * recipe.calibration.samples, layout)


def _training(recipe: Recipe, layout: Layout, workload: Workload, speed: Speed) -> _Work | None:
    config = recipe.training
    if config.steps is None and workload.examples is None:
        return None
    steps = config.total_steps(workload.examples or 0)
    tokens = config.batch * config.accumulation * workload.example
    targets, _ = adapted(layout.family, config.target_modules, None)
    inside = sum(prod(s) for n, s in layout.linears.items() if n.rsplit(".", 1)[1] in targets)
    # Forward and backward to the inputs of all, to the weight of what is adapted; B A is made
    # twice and has two gradients.
    through = 2 * (layout.weights + layout.head) + inside
    if config.gradient_checkpointing:
        through += layout.weights
    products = 2 * tokens * through + 8 * config.max_rank * inside
    vocabulary, width = layout.embedding
    hidden = layout.blocks * width * tokens
    elements = STEP_WEIGHTS * inside + STEP_LOGITS * tokens * vocabulary
    dtype = speed.dtype(config.precision)
    products *= steps / STEP_EFFICIENCY[dtype]
    return _Work({dtype: products}, steps * (elements + STEP_HIDDEN * hidden))


def _calibration_tokens(recipe: Recipe, workload: Workload) -> float:
    longest = recipe.calibration.sequence_length
    of_task = recipe.calibration.source == "task"
    return recipe.calibration.samples * (min(workload.example, longest) if of_task else longest)


def _runtimes(recipe: Recipe, packed: float = 1) -> float:
    """Deployments that are made, a packed one counting for so much."""
    export = recipe.export
    return len(export.targets) * (1 + packed * export.sparse_files) + export.sparse_execution


def _verified(recipe: Recipe, layout: Layout, workload: Workload, machine: Speeds) -> float:
    """Every deployment is read back, and says in both of its modes what torch, asked once, says."""
    made = _runtimes(recipe, CHECKED_PACKED)
    forward = 2 * layout.weights * _checked_tokens(recipe, workload)
    compared = (ELEMENTWISE["verify"] + made * CHECKED) * layout.weights
    loaded = made * CHECKED_ALONE * layout.weights
    loaded += (ALONE_OUTER["verify"] + made * CHECKED_OUTER) * layout.others
    seconds = made * (CHECKED_SECONDS + CHECKED_BLOCK * layout.blocks)
    return (
        _Work({FLOAT32: 2 * made * forward}, compared).on(machine.cpu)
        + _gone_through("verify", _Work({}, loaded, seconds), machine)
        + _Work({FLOAT32: forward}).on(machine.device)
    )


def _checked_tokens(recipe: Recipe, workload: Workload) -> float:
    """Of the prompts of verify and what follows them; of a text window, a quarter is the prompt."""
    length = workload.prompt or min(workload.scored, recipe.task.sequence_length) / 4
    return recipe.verify.prompts * (length + recipe.verify.new_tokens)


def _scored_tokens(items: float, workload: Workload) -> float:
    """That go through a model for the answers to so many items, those that fill up a batch too."""
    return items * PADDED * (workload.scored + workload.prompt + DECODED * workload.answer)


def _evaluations(recipe: Recipe, layout: Layout, workload: Workload) -> _Work:
    """Of a search, each through the weights that its ranks make, as a step of training does."""
    if not recipe.search.evaluates:
        return _Work()
    search, weights = recipe.search, layout.weights + layout.head
    flops = 2 * weights * _scored_tokens(search.items, workload)
    elements = STEP_WEIGHTS * layout.weights * _batches(search.items, workload)
    return _Work({FLOAT32: search.budget * flops}, search.budget * elements)


def _batches(items: float, workload: Workload) -> float:
    """Times that a model is called to answer so many items."""
    return items / ROWS * (1 + workload.answer)


def _scoring(recipe: Recipe, layout: Layout, workload: Workload, machine: Speeds) -> float:
    """Every row scores the items and is timed, in processes of its own."""
    asked, weights = recipe.benchmark, layout.weights + layout.head
    items = asked.items if workload.test is None else workload.test
    scored = _scored_tokens(items, workload)
    scored += COMPARED if "dense" in asked.baselines else 0
    rounds = asked.rounds * (asked.repeats + 1)
    bits = 32 if recipe.quantize.method == "none" else max(4, recipe.quantize.bits)
    in_torch = machine.device.dtype("auto") if layout.width == 2 else FLOAT32
    width = 4 if in_torch == FLOAT32 else 2
    stored = layout.weights * bits / 8 + 4 * layout.head
    alone = rounds * asked.new_tokens
    taken = 0.0
    for kind, speed, dtype, rows, read in (
        ("torch", machine.device, in_torch, _torch_rows_asked(recipe), width * weights),
        ("runtime", machine.cpu, FLOAT32, _runtimes(recipe), stored),
    ):
        flops = 2 * weights * (scored + rounds * asked.prompt_tokens)
        # A token alone is as fast as the weights are read.
        elements = alone * read / STEP_BYTES
        fixed = alone * TOKEN_SECONDS[kind] * layout.blocks + asked.rounds * ROW_SECONDS[kind]
        taken += rows * _Work({dtype: flops}, elements, fixed).on(speed)
    if recipe.adapt and "adapted" in asked.baselines:  # makes its weights in every call
        calls = alone + rounds + _batches(items, workload)
        taken += _Work({}, STEP_WEIGHTS * layout.weights * calls).on(machine.device)
    return taken


def _torch_rows_asked(recipe: Recipe) -> int:
    """Rows in torch of those asked for that a recipe has."""
    trained = () if recipe.adapt else ("dense-lora", "sparse-quantized", "adapted")
    return sum(row not in trained for row in recipe.benchmark.baselines)


def _solver(layout: Layout, tokens: float) -> float:
    """Of GPTQ: sums, factors and updates; what stands together shares its inputs."""
    total, seen = 0.0, set()
    for name, (outputs, inputs) in layout.linears.items():
        shared = name.rpartition(".")[0], inputs
        if shared not in seen:
            seen.add(shared)
            total += 2 * tokens * inputs**2 + 2 / 3 * inputs**3
        total += outputs * inputs**2
    return total


def ways_to_fit_a_day(
    recipe: Recipe, seconds: dict[str, float | None], workload: Workload
) -> str | None:
    """Settings with which passes that are to run fit a day; None where they do as they are.

    :param seconds: of those passes.
    """
    known = {name: taken or 0.0 for name, taken in seconds.items()}
    if sum(known.values()) <= DAY:
        return None
    settings = []
    if known.get("benchmark", 0) > 60 * FEW_MINUTES:
        known["benchmark"] = 60.0 * FEW_MINUTES
        settings.append(f"benchmark.minutes={FEW_MINUTES}")
    trained = known.get("adapt", 0) + known.get("teacher", 0)
    left = DAY - (sum(known.values()) - trained)
    if left < trained:
        if left <= 0 or not trained:
            return "none: an accelerator, or a machine with more of them"
        steps = recipe.training.total_steps(workload.examples or 0)
        settings.append(f"adapt.epochs=null adapt.steps={int(steps * left / trained)}")
    return " ".join(settings)


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
    return 4 * whole if 4 * whole <= FLOAT32_ROOM * free_memory() else layout.width * whole


def _in_llama_cpp(recipe: Recipe, weights: int) -> float:
    """Bytes of the float32 copy that a GGUF file is compared by, where there is room for one."""
    fits = 4 * weights <= FLOAT32_ROOM * free_memory()
    return 4 * weights if "gguf" in recipe.export.targets and fits else 0


def _compared(recipe: Recipe, layout: Layout, workload: Workload) -> float:
    """Bytes of layers at once, and of the logits of torch and of a runtime in both of its modes."""
    layers = min(MOST, allowed_processors()) * max(map(prod, layout.linears.values()))
    vocabulary, _ = layout.embedding
    return 4 * layers + 3 * 4 * vocabulary * _checked_tokens(recipe, workload)


def _cached(recipe: Recipe, layout: Layout, workload: Workload) -> float:
    """Bytes of the keys and values of a batch, in float32."""
    _, width = layout.embedding
    rows = min(ROWS, recipe.benchmark.items)
    most = workload.prompt + getattr(recipe.task, "max_new_tokens", 0) if workload.answer else 0
    return min(CACHED, rows * most) * 2 * 4 * width * layout.blocks * KEYS


def _reconstruction_bytes(
    config: Reconstruct | None, recipe: Recipe, layout: Layout, workload: Workload
) -> float:
    """Two blocks, gradients and moments of one and what it is in the step at hand, hidden states of
    both and targets, and what a step keeps for backward."""
    if config is None:
        return 0
    _, width = layout.embedding
    hidden = 4 * _calibration_tokens(recipe, workload) * width
    inside = sum(sum(shape) for shape in layout.linears.values()) / layout.blocks
    drawn = min(config.batch, recipe.calibration.samples) / recipe.calibration.samples
    kept = 4 * KEPT * drawn * _calibration_tokens(recipe, workload) * inside
    return MAPPED + 8 * 4 * layout.weights / layout.blocks + 5 * hidden + kept


def predict_memory(recipe: Recipe, layout: Layout, workload: Workload) -> dict[str, float]:
    """Peak resident bytes of every pass, and of the processes it starts."""
    written = predict_bytes(recipe, layout)
    block = 4 * layout.weights / layout.blocks
    largest = 4 * max(map(prod, layout.linears.values()))
    widest = max(inputs for _, inputs in layout.linears.values())
    activations = 4 * _calibration_tokens(recipe, workload) * widest
    outer, whole = 4 * layout.others, layout.weights + layout.others
    gptq = recipe.quantize.method == "gptq"
    exported = max((written[f"export-{name}"] for name in recipe.export.targets), default=0)
    deployed = exported / (1 + recipe.export.sparse_files)
    loaded = layout.width * whole + layout.weights / 8
    in_float = _torch_rows(recipe, layout)
    of_pass = {
        "sparsify": MAPPED + block + 3 * largest + activations,
        "reconstruct": _reconstruction_bytes(recipe.sparsify.reconstruct, recipe, layout, workload),
        "quantize": max(
            MAPPED + block + 2 * largest + 4 * widest**2 * gptq + activations,
            _reconstruction_bytes(recipe.quantize.reconstruct, recipe, layout, workload),
        ),
        # The tuned model runs once, for what it computed with: a weight at a time is digested.
        "search": LOGITS + loaded + outer + 3 * largest + 2 * _adapter_bytes(recipe, layout),
        "merge": 4 * largest + 2**29,
        "export-openvino": deployed,
        "export-onnx": MAPPED + 2 * largest + outer,
        "export-gguf": MAPPED + largest,
        "verify": _compared(recipe, layout, workload) + 2 * deployed + _in_llama_cpp(recipe, whole),
        "benchmark": max(deployed, in_float) + PASS_BYTES + _cached(recipe, layout, workload),
    }
    of_pass["baselines"] = of_pass["merge"]
    if recipe.adapt is None:  # verify runs what was compressed, as search does what was tuned
        of_pass["verify"] = max(of_pass["verify"], of_pass["search"])
    else:
        in_training = _activations(recipe, layout, workload)
        in_training += outer if recipe.adapt.precision == FLOAT32 else 0
        of_pass["adapt"] = loaded + in_training + 5 * written["adapt"] + 4 * largest
        of_pass["teacher"] = of_pass["adapt"]
    return {name: FIXED_MEMORY + of_pass.get(name, 0) for name in written}


def free_memory() -> int:
    """Bytes that can be taken without swapping."""
    return int(psutil.virtual_memory().available)


def check_memory(recipe: Recipe, layout: Layout, workload: Workload, passes: list[str]) -> None:
    """Refuse passes that this machine's free memory can't hold.

    :raises HostError: with the pass, bytes needed and free.
    """
    free = free_memory()
    needed = {
        name: size
        for name, size in predict_memory(recipe, layout, workload).items()
        if name in passes
    }
    worst = max(needed, key=needed.__getitem__, default=None)
    if worst is not None and needed[worst] > free:
        raise HostError(
            f"{recipe.file}: memory: {worst} needs {size_text(needed[worst])}, "
            f"{size_text(free)} are free"
        )
