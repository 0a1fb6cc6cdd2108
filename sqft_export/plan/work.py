"""Counts the work of passes that depends on data: FLOPs, memory traffic and calls."""

from dataclasses import dataclass
from math import prod

from sqft_export.machine.host import float32_fits
from sqft_export.measure.batches import MAX_BATCH_ROWS
from sqft_export.model.families import adapted
from sqft_export.plan.layout import Layout
from sqft_export.plan.speeds import Speed
from sqft_export.plan.workload import Workload, calibration_tokens
from sqft_export.recipe.schema import Recipe

FLOAT32 = "float32"
# Products of a training step are narrower than the measured one and reach this share of its speed.
PRODUCT_EFFICIENCY = 0.55
STEP_PASSES = {"weights": 4.0, "logits": 10.0, "hidden": 60.0}  # elementwise passes per step
ADAM_PASSES = 12.0  # passes over all weights of a block per step of its reconstruction
CALL_SECONDS = 1.5e-3  # one block called with one calibration sample
COLUMN_SECONDS = {"gptq": 2.2e-4, "sparsegpt": 1.2e-4}  # one column of a Linear, besides FLOPs
BYTES_PER_ELEMENT = 12.0  # memory traffic of one measured multiply-add
PADDED_TOKENS = 1.3  # tokens of a padded batch per token of its prompts
DECODED_TOKENS = 2.0  # cost of a generated token in a batch, in prompt tokens


@dataclass(frozen=True)
class Work:
    """Counted work, which takes a time that depends on the speed of a device.

    flops: floating-point operations of matrix products in ``dtype``.
    elements: float32 elements of multiply-adds in memory.
    seconds: constant time, independent of the speed.
    """

    flops: float = 0.0
    elements: float = 0.0
    seconds: float = 0.0
    dtype: str = FLOAT32

    def __add__(self, other: "Work") -> "Work":
        assert other.dtype == self.dtype
        return Work(
            self.flops + other.flops,
            self.elements + other.elements,
            self.seconds + other.seconds,
            self.dtype,
        )

    def __mul__(self, times: float) -> "Work":
        return Work(times * self.flops, times * self.elements, times * self.seconds, self.dtype)

    def on(self, speed: Speed) -> float:
        """Return the seconds that the work takes at a measured speed."""
        return (
            self.seconds + self.flops / speed.products[self.dtype] + self.elements / speed.elements
        )


def count_calibration(name: str, recipe: Recipe, layout: Layout, workload: Workload) -> Work:
    """Count sparsify, quantize or a peer: two runs of the samples, and the solver of the method."""
    method = {
        "sparsify": recipe.sparsify.method,
        "quantize": recipe.quantize.method,
        "peers-grid": "gptq",
    }.get(name, name)
    rebuilt = name == "quantize" and recipe.quantize.reconstruct is not None
    work = count_reconstruction(recipe, layout, workload) if rebuilt else Work()
    if method in ("magnitude", "rtn", "existing", "none"):
        return work
    tokens = calibration_tokens(recipe, workload)
    work += Work(4 * layout.weights * tokens) + _calls(recipe, layout) * 2
    if method in COLUMN_SECONDS:
        columns = sum(inputs for _, inputs in layout.linears.values())
        work += Work(_solver_flops(layout, tokens), 0, COLUMN_SECONDS[method] * columns)
    return work


def _calls(recipe: Recipe, layout: Layout) -> Work:
    """Count one call of every block per calibration sample; each call reads the block's weights."""
    calls = recipe.calibration.samples
    elements = calls * 4 * layout.weights / BYTES_PER_ELEMENT
    return Work(0, elements, calls * layout.blocks * CALL_SECONDS)


def _solver_flops(layout: Layout, tokens: float) -> float:
    """Count FLOPs of Hessians, factors and column updates; Linears with equal input share one."""
    hessians = {(n.rpartition(".")[0], i): i for n, (_, i) in layout.linears.items()}.values()
    shared = sum(2 * tokens * inputs**2 + 2 / 3 * inputs**3 for inputs in hessians)
    return shared + sum(outputs * inputs**2 for outputs, inputs in layout.linears.values())


def count_reconstruction(recipe: Recipe, layout: Layout, workload: Workload) -> Work:
    """Count forward, backward and Adam of every step, and five runs of the samples per block."""
    config = recipe.quantize.reconstruct or recipe.sparsify.reconstruct
    assert config is not None
    samples = recipe.calibration.samples
    steps = 3 * config.steps * min(config.batch, samples) / samples
    flops = 2 * layout.weights * calibration_tokens(recipe, workload) * (steps + 5)
    step = Work(flops / PRODUCT_EFFICIENCY, ADAM_PASSES * config.steps * layout.weights)
    return step + _calls(recipe, layout) * 5


def count_training(recipe: Recipe, layout: Layout, workload: Workload, dtype: str) -> Work | None:
    """Count forward, backward and effective weights of every step; None if steps are unknown."""
    config = recipe.training
    if config.steps is None and workload.examples is None:
        return None
    tokens = config.batch * config.accumulation * workload.example
    targets, _ = adapted(layout.family, config.target_modules, None)
    inside = sum(prod(s) for n, s in layout.linears.items() if n.rsplit(".", 1)[1] in targets)
    through = 2 * (layout.weights + layout.head) + inside
    through += config.gradient_checkpointing * layout.weights
    flops = 2 * tokens * through + 8 * config.max_rank * inside
    vocabulary, width = layout.embedding
    elements = STEP_PASSES["weights"] * inside + STEP_PASSES["logits"] * tokens * vocabulary
    elements += STEP_PASSES["hidden"] * tokens * layout.blocks * width
    step = Work(flops / PRODUCT_EFFICIENCY, elements, dtype=dtype)
    return step * config.total_steps(workload.examples or 0)


def count_scored_tokens(items: float, workload: Workload) -> float:
    """Return the number of prompt tokens that cost as much as scoring ``items``, with padding."""
    generated = workload.prompt + DECODED_TOKENS * workload.answer
    return PADDED_TOKENS * items * (workload.scored + generated)


def count_evaluations(recipe: Recipe, layout: Layout, workload: Workload) -> Work:
    """Count the scoring of a search's items with every configuration that it evaluates."""
    search = recipe.search
    if not search.evaluates:
        return Work()
    flops = 2 * (layout.weights + layout.head) * count_scored_tokens(search.items, workload)
    made = count_effective_weights(layout, search.items / MAX_BATCH_ROWS * (1 + workload.answer))
    return (Work(flops) + made) * search.budget


def count_effective_weights(layout: Layout, calls: float) -> Work:
    """Count the effective weights of all Linears: once if they fit into memory, else per call."""
    made = min(1, calls) if float32_fits(layout.weights) else calls
    return Work(0, STEP_PASSES["weights"] * layout.weights * made)
