"""Seconds that a pass will take on this machine, from counted work.

Work is counted in three kinds: multiplications of matrix products, passes of an elementwise
operation over a weight, bytes written. How fast the machine does each is measured for a second.
How many elementwise passes each of ours comes to, and what a library takes whatever the model, are
constants; `benchmarks/real_size.py` compares what they foretell with a run.
"""

from dataclasses import dataclass, field, replace
from math import prod

from sqft_export.measure.agreement import COMPARED
from sqft_export.measure.batches import ROWS
from sqft_export.model.families import adapted
from sqft_export.plan.disk import predict_bytes
from sqft_export.plan.layout import Layout
from sqft_export.plan.speeds import Speed, Speeds
from sqft_export.plan.workload import Workload, calibration_tokens, checked_tokens
from sqft_export.recipe.schema import Recipe, Reconstruct
from sqft_export.run.host import float32_fits

FLOAT32 = "float32"
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
ALONE_OUTER = {"export-openvino": 105, "export-onnx": 48, "verify": 20}
SHARED = {"export-openvino": 0.4, "export-onnx": 0.5, "verify": 0.5}
# What verify does more of every deployment: passes of all threads and of one over decoder weights,
# of one over the others; seconds of it and of each of its blocks. A packed one is inflated and
# asked once.
CHECKED, CHECKED_ALONE, CHECKED_OUTER = 10, 18, 62
CHECKED_SECONDS, CHECKED_BLOCK = 1.5, 0.35
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
    "verify": 4.0,
}
ACCELERATOR_SECONDS = 1.5  # it starts, and its kernels are loaded
BLOCK_SECONDS = {"export-openvino": 0.45, "export-onnx": 0.12}  # a block is traced, or built
WORD_SECONDS = {"export-gguf": 5e-5}  # a word of the vocabulary is told
CALL_SECONDS = 1.5e-3  # a block called with a calibration sample, over products and weights read
COLUMN_SECONDS = {"gptq": 2.2e-4, "sparsegpt": 1.2e-4}  # a column, over its arithmetic
# A row of a benchmark: its process starts, a runtime's goes through the weights with one thread,
# and distributions are held to those of others; a token alone goes through a block.
ROW_SECONDS = {"torch": 6.4, "runtime": 0.5}
ROW_LOADED, ROW_BESIDE = 3, 90
TOKEN_SECONDS = {"torch": 8e-4, "runtime": 2e-4}
STEP_BYTES = 12.0  # of memory that a multiply-add over an element moves
PADDED = 1.3  # tokens of a batch with those that fill it up
DECODED = 2.0  # a token that is generated in a batch, over one of a prompt
DAY = 24 * 3600.0
FEW_MINUTES = 30  # of a benchmark that is to fit a day


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
    tokens = calibration_tokens(recipe, workload)
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
    tokens = calibration_tokens(recipe, workload)
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


def _runtimes(recipe: Recipe, packed: float = 1) -> float:
    """Deployments that are made, a packed one counting for so much."""
    export = recipe.export
    return len(export.targets) * (1 + packed * export.sparse_files) + export.sparse_execution


def _verified(recipe: Recipe, layout: Layout, workload: Workload, machine: Speeds) -> float:
    """Every deployment is read back, and says in both of its modes what torch, asked once, says."""
    made = _runtimes(recipe, CHECKED_PACKED)
    forward = 2 * layout.weights * checked_tokens(recipe, workload)
    compared = (ELEMENTWISE["verify"] + made * CHECKED) * layout.weights
    loaded = made * CHECKED_ALONE * layout.weights
    loaded += (ALONE_OUTER["verify"] + made * CHECKED_OUTER) * layout.others
    seconds = made * (CHECKED_SECONDS + CHECKED_BLOCK * layout.blocks)
    return (
        _Work({FLOAT32: 2 * made * forward}, compared).on(machine.cpu)
        + _gone_through("verify", _Work({}, loaded, seconds), machine)
        + _Work({FLOAT32: forward}).on(machine.device)
    )


def _scored_tokens(items: float, workload: Workload) -> float:
    """That go through a model for the answers to so many items, those that fill up a batch too."""
    return items * PADDED * (workload.scored + workload.prompt + DECODED * workload.answer)


def _evaluations(recipe: Recipe, layout: Layout, workload: Workload) -> _Work:
    """Of a search, each through the weights that its ranks make."""
    if not recipe.search.evaluates:
        return _Work()
    search, weights = recipe.search, layout.weights + layout.head
    flops = 2 * weights * _scored_tokens(search.items, workload)
    elements = STEP_WEIGHTS * layout.weights * _makes(layout, _batches(search.items, workload))
    return _Work({FLOAT32: search.budget * flops}, search.budget * elements)


def _makes(layout: Layout, calls: float) -> float:
    """Times that a tuned, unmerged model makes its weights in so many calls at the same ranks."""
    return min(1, calls) if float32_fits(layout.weights) else calls


def _batches(items: float, workload: Workload) -> float:
    """Times that a model is called to answer so many items."""
    return items / ROWS * (1 + workload.answer)


def _scoring(recipe: Recipe, layout: Layout, workload: Workload, machine: Speeds) -> float:
    """Every row scores the items and is timed, in processes of its own."""
    asked, weights = recipe.benchmark, layout.weights + layout.head
    items = asked.items if workload.test is None else workload.test
    compared = COMPARED if {"dense", "merged"} & set(asked.baselines) else 0
    scored = _scored_tokens(items, workload) + compared
    rounds = asked.rounds * (asked.repeats + 1)
    bits = 32 if recipe.quantize.method == "none" else max(4, recipe.quantize.bits)
    in_torch = machine.device.dtype("auto") if layout.width == 2 else FLOAT32
    width = 4 if in_torch == FLOAT32 else 2
    stored = layout.weights * bits / 8 + 4 * layout.head
    rows, runtimes = _torch_rows_asked(recipe), _runtimes(recipe)
    alone = rounds * asked.new_tokens
    taken = 0.0
    for kind, speed, dtype, count, read in (
        ("torch", machine.device, in_torch, rows, width * weights),
        ("runtime", machine.cpu, FLOAT32, runtimes, stored),
    ):
        flops = 2 * weights * (scored + rounds * asked.prompt_tokens)
        # A token alone is as fast as the weights are read.
        elements = alone * read / STEP_BYTES
        fixed = alone * TOKEN_SECONDS[kind] * layout.blocks + asked.rounds * ROW_SECONDS[kind]
        taken += count * _Work({dtype: flops}, elements, fixed).on(speed)
    if recipe.adapt and "adapted" in asked.baselines:
        calls = (alone + rounds + _batches(items, workload)) / asked.rounds
        made = asked.rounds * _makes(layout, calls)
        taken += _Work({}, STEP_WEIGHTS * layout.weights * made).on(machine.device)
    beside = (rows + runtimes) * ROW_BESIDE * compared * layout.embedding[0]
    loaded = asked.rounds * runtimes * ROW_LOADED * layout.weights
    return taken + _Work({}, beside).on(machine.cpu) + _Work({}, loaded).on(machine.alone)


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
