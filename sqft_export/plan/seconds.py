"""Predicted seconds of every pass on this machine: counted work at measured speeds.

``PASS_COSTS`` was fitted to SmolLM2-135M, the embedded model and Mistral-shaped blocks
(``benchmarks/real_size.py``). A prediction is right within a factor of two.
"""

from dataclasses import dataclass

from sqft_export.measure.agreement import COMPARED_TOKENS
from sqft_export.measure.batches import MAX_BATCH_ROWS
from sqft_export.plan import work as counted
from sqft_export.plan.disk import predict_bytes
from sqft_export.plan.layout import Layout
from sqft_export.plan.speeds import Speed, Speeds
from sqft_export.plan.work import BYTES_PER_ELEMENT, FLOAT32, Work
from sqft_export.plan.workload import Workload, checked_tokens
from sqft_export.recipe.passes import runs_on_cpu
from sqft_export.recipe.peers import PEERS
from sqft_export.recipe.schema import Recipe


@dataclass(frozen=True)
class Cost:
    """Cost of a pass that depends on the model alone.

    weights: passes over the decoder weights, each a multiply-add over float32 in memory.
    others: the same over embedding, head and norms.
    seconds: imports, tracing, start of runtimes; per_block: the same per decoder block.
    place: "device", where torch computes; "cpu", all threads; or "thread", one thread.
    """

    weights: float = 0
    others: float = 0
    seconds: float = 1.0
    per_block: float = 0.0
    place: str = "cpu"

    def on(self, speed: Speed, layout: Layout) -> float:
        """Return the seconds that the pass takes at a measured speed."""
        elements = self.weights * layout.weights + self.others * layout.others
        return Work(0, elements, self.seconds + self.per_block * layout.blocks).on(speed)


STREAMED_PASSES = 19  # over all weights, which the self-test's reference reads for each pass
PROBE_TOKENS = 7000  # of its prompts
PASS_COSTS = {
    "sparsify": Cost(95, seconds=5, place="device"),
    "reconstruct": Cost(place="device"),
    "quantize": Cost(52, place="device"),
    "teacher": Cost(24, seconds=4, place="device"),
    "adapt": Cost(24, seconds=4, place="device"),
    "search": Cost(52, seconds=2),
    "merge": Cost(22 + 2 * STREAMED_PASSES, seconds=2.5),
    "export-openvino": Cost(10, 85, 1, 0.45, "thread"),
    "export-onnx": Cost(15, 37, 1, 0.12, "thread"),
    "export-gguf": Cost(21, 0, 3, place="thread"),
    "export-web": Cost(17, 37, 1, 0.12, "thread"),
    "verify": Cost(28, 20, 4),
    "baselines": Cost(22),
    "peers-grid": Cost(75, 120, 3, 0.45, "device"),
    "peers-gguf": Cost(60, 20, 5, place="device"),
    "peers-nncf": Cost(60, 85, 5, 1.0, "cpu"),
    "benchmark": Cost(),
    "report": Cost(),
}
VERIFIED_DEPLOYMENT = Cost(20, 50, 1.5, 0.35)
ACCELERATOR_SECONDS = 1.5  # start of the device and its kernels
ROW_SECONDS = {"torch": 6.4, "runtime": 2.0}  # start of one process of the benchmark
TOKEN_SECONDS = {"torch": 8e-4, "runtime": 2e-4}  # one block, one token
KL_PASSES = 90  # elementwise passes over two distributions per compared token


def predict_seconds(
    recipe: Recipe, layout: Layout, machine: Speeds, workload: Workload
) -> dict[str, float | None]:
    """Predict the seconds of every pass; None if its data is not on this machine."""
    found = dict[str, float | None]()
    for name, size in predict_bytes(recipe, layout).items():
        speed = _speed(name, recipe, machine)
        seconds = _work_seconds(name, recipe, layout, workload, machine)
        if seconds is not None:
            seconds += PASS_COSTS[name].on(speed, layout) + size / machine.disk
            seconds += ACCELERATOR_SECONDS * (speed not in (machine.cpu, machine.one_thread))
        found[name] = seconds
    if "benchmark" in found and (minutes := recipe.benchmark.minutes):
        found["benchmark"] = 60 * minutes
    return found


def _speed(name: str, recipe: Recipe, machine: Speeds) -> Speed:
    if PASS_COSTS[name].place == "thread":
        return machine.one_thread
    on_cpu = PASS_COSTS[name].place == "cpu" or runs_on_cpu(name, recipe)
    return machine.cpu if on_cpu else machine.device


def _work_seconds(
    name: str, recipe: Recipe, layout: Layout, workload: Workload, machine: Speeds
) -> float | None:
    """Return the seconds of work that depends on data or deployments; None if data is missing."""
    speed = _speed(name, recipe, machine)
    if name in ("sparsify", "quantize", "peers-grid", "peers-gguf", "peers-nncf"):
        return counted.count_calibration(name, recipe, layout, workload).on(speed)
    if name == "reconstruct":
        return counted.count_reconstruction(recipe, layout, workload).on(speed)
    if name in ("adapt", "teacher"):
        dtype = speed.dtype(recipe.training.precision)
        work = counted.count_training(recipe, layout, workload, dtype)
        return None if work is None else work.on(speed)
    if name == "search":
        return counted.count_evaluations(recipe, layout, workload).on(machine.device)
    if name == "verify":
        forward = Work(2 * layout.weights * checked_tokens(recipe, workload))
        each = VERIFIED_DEPLOYMENT.on(machine.cpu, layout) + (forward * 2).on(machine.cpu)
        return _deployments(recipe) * each + forward.on(machine.device)
    if name == "merge":
        tokens = PROBE_TOKENS if workload.prompt else 0
        return Work(2 * layout.weights * tokens).on(speed)
    if name == "benchmark":
        return _scoring_seconds(recipe, layout, workload, machine)
    # Packing a GGUF file writes every tensor again.
    packed = name == "export-gguf" and recipe.export.sparse_files
    return PASS_COSTS[name].on(speed, layout) if packed else 0.0


def _deployments(recipe: Recipe) -> int:
    export = recipe.export
    return len(export.targets) * (1 + export.sparse_files) + export.sparse_execution


def _scoring_seconds(recipe: Recipe, layout: Layout, workload: Workload, machine: Speeds) -> float:
    """Return the seconds of the benchmark: each row scores once and is timed in each round."""
    config, weights = recipe.benchmark, layout.weights + layout.head
    items = config.items if workload.test is None else workload.test
    skipped = () if recipe.adapt else ("dense-lora", "sparse-quantized", "adapted")
    in_torch = [row for row in config.baselines if row not in (*skipped, *PEERS)]
    files = len(recipe.peers) + (
        len(recipe.grid_targets) - 1 if "lora-then-int4" in recipe.peers else 0
    )
    compared = COMPARED_TOKENS if {"dense", "merged"} & set(in_torch) else 0
    passes = config.rounds * (config.repeats + 1)
    dtype = machine.device.dtype("auto") if layout.width == 2 else FLOAT32
    bits = 32 if recipe.quantize.method == "none" else max(4, recipe.quantize.bits)
    tokens = counted.count_scored_tokens(items, workload) + compared + passes * config.prompt_tokens
    seconds = 0.0
    for kind, speed, precision, rows, stored in (
        ("torch", machine.device, dtype, len(in_torch), (4 - 2 * (dtype != FLOAT32)) * weights),
        ("runtime", machine.cpu, FLOAT32, _deployments(recipe) + files, layout.weights * bits / 8),
    ):
        decoded = passes * config.new_tokens
        fixed = decoded * TOKEN_SECONDS[kind] * layout.blocks + config.rounds * ROW_SECONDS[kind]
        row = Work(2 * weights * tokens, decoded * stored / BYTES_PER_ELEMENT, fixed, precision)
        kl = Work(0, KL_PASSES * compared * layout.embedding[0])
        seconds += rows * (row.on(speed) + kl.on(machine.cpu))
    if "adapted" in in_torch:
        calls = passes * (config.new_tokens + 1) + items / MAX_BATCH_ROWS * (1 + workload.answer)
        made = counted.count_effective_weights(layout, calls / config.rounds) * config.rounds
        seconds += made.on(machine.device)
    return seconds
