"""Seconds and peak memory of every pass at the width of Mistral-7B, compared with `plan`.

    python benchmarks/real_size.py [--blocks 8] [--runs <folder>] [--small] [--device cuda]

Runs all passes of the recipe `mistral` on a checkpoint of the true width with random weights and
`--blocks` blocks, with few calibration samples, prompts and steps. Each pass is a separate process;
the kernel reports the peak of it and its children. A first run has a quarter of the blocks; the
difference per block gives seconds and memory of 32 blocks. `--runs` keeps the runs and their
measurements; with it, a second call only compares again.
"""

import argparse
import json
import resource
import sys
import tempfile
from pathlib import Path

from document import finish, in_a_process, spread, table
from shapes import SMALL, WIDE, write_checkpoint

from sqft_export.measure.worker import peak_memory
from sqft_export.plan.layout import layout_of
from sqft_export.plan.memory import predict_memory
from sqft_export.plan.seconds import predict_seconds
from sqft_export.plan.speeds import measure_speeds
from sqft_export.plan.workload import workload_of
from sqft_export.recipe.load import load_recipe
from sqft_export.recipe.passes import pass_names
from sqft_export.recipe.schema import Recipe
from sqft_export.run.pipeline import run_recipe

ROOT = Path(__file__).parent.parent
GIB = 2**30
WORDS = 32768
WHOLE = 32  # blocks of the real model
SETTINGS = (
    "name=real-size",
    "model.config=null",
    "task={kind: text, text: 'builtin:tiny/train.jsonl', sequence_length: 64}",
    "calibration={samples: 4, sequence_length: 128}",
    "adapt.steps=2",
    "adapt.epochs=null",
    "adapt.batch=1",
    "verify={prompts: 4, new_tokens: 4}",
    "benchmark={items: 2, baselines: [], prompt_tokens: 32, new_tokens: 8, repeats: 2}",
)


def recipe_of(model: Path, device: str) -> Recipe:
    settings = (*SETTINGS, f"device={device}")
    return load_recipe(ROOT / "recipes" / "mistral.yaml", settings, model)


def child(model: Path, runs: Path, name: str, device: str) -> None:
    """One pass, those before it being there; seconds and peak of this process and its children."""
    artifacts = run_recipe(recipe_of(model, device), runs, (name,))
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    seconds = artifacts[name].manifest["seconds"]
    told = {"seconds": seconds, "peak": max(peak_memory(), children)}
    print(json.dumps(told))


def model_at(root: Path, shape: dict[str, int], blocks: int) -> Path:
    """The checkpoint with so many blocks, made where it is not there yet."""
    model = root / f"{blocks}" / "model"
    if not model.is_dir():
        write_checkpoint(model, shape, blocks, WORDS)
    return model


def measure(
    root: Path, shape: dict[str, int], blocks: int, device: str
) -> dict[str, dict[str, float]]:
    """Pass -> seconds and peak; what was measured in ``root`` before is not measured again."""
    model, runs, file = model_at(root, shape, blocks), root / f"{blocks}" / "runs", root / "m.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    found = known.setdefault(str(blocks), {})
    for name in pass_names(recipe_of(model, device)):
        if name not in found:
            found[name] = in_a_process(__file__, "--child", str(model), str(runs), name, device)
            print(name, found[name], file=sys.stderr, flush=True)
            file.write_text(json.dumps(known))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--runs", type=Path, help="keep what is made here")
    parser.add_argument("--small", action="store_true", help="256 wide, to see that it runs")
    parser.add_argument("--device", default="auto", help="where torch computes")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        model, runs, name, device = arguments.child
        child(Path(model), Path(runs), name, device)
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = arguments.runs or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        report(root, SMALL if arguments.small else WIDE, arguments.blocks, arguments.device)


def predict(
    root: Path, shape: dict[str, int], blocks: int, device: str
) -> dict[str, tuple[float, float]]:
    """Pass -> seconds and bytes, as `plan` says them before a run."""
    model = model_at(root, shape, blocks)
    recipe = recipe_of(model, device)
    layout, workload = layout_of(recipe, model), workload_of(recipe, model)
    speeds = measure_speeds(layout, recipe.device)
    for speed in {speed.name: speed for speed in (speeds.cpu, speeds.device)}.values():
        products = ", ".join(f"{rate / 1e9:.0f} in {d}" for d, rate in speed.products.items())
        print(f"{speed.name}: GFLOP/s {products}; 1e9 elements/s {speed.elements / 1e9:.2f}")
    print(f"one thread: 1e9 elements/s {speeds.one_thread.elements / 1e9:.2f}")
    seconds = predict_seconds(recipe, layout, speeds, workload)
    memory = predict_memory(recipe, layout, workload)
    return {name: (seconds[name] or 0, memory[name]) for name in seconds}


def report(root: Path, shape: dict[str, int], blocks: int, device: str) -> None:
    """A quarter of the blocks first: what is stopped then has said something."""
    few, measured = max(blocks // 4, 1), {}
    for count in (few, blocks):
        predicted = predict(root, shape, count, device)
        measured[count] = measure(root, shape, count, device)
        print(f"{count} blocks")
        compare(measured[count], predicted)
    rows, whole = [], {}
    for name, found in measured[blocks].items():
        grown = {k: (v - measured[few][name][k]) / (blocks - few) for k, v in found.items()}
        whole[name] = {k: v + (WHOLE - blocks) * grown[k] for k, v in found.items()}
        rows.append([name, whole[name]["seconds"], whole[name]["peak"] / GIB])
    print(f"{WHOLE} blocks, by what {few} and {blocks} take")
    table(["pass", "s", "peak GiB"], rows)
    ratios = {}
    for name, (seconds, memory) in predicted.items():
        ratios[f"{name} seconds"] = spread([seconds / measured[blocks][name]["seconds"]])
        ratios[f"{name} memory"] = spread([memory / measured[blocks][name]["peak"]])
    values = {"measured": measured, "predicted": predicted, f"of {WHOLE}": whole}
    finish("real_size", ratios, values)


def compare(
    measured: dict[str, dict[str, float]], predicted: dict[str, tuple[float, float]]
) -> None:
    rows = []
    for name, found in measured.items():
        seconds, memory = predicted[name]
        times = [found["seconds"], seconds, seconds / found["seconds"]]
        sizes = [found["peak"] / GIB, memory / GIB, memory / found["peak"]]
        rows.append([name, *times, *sizes])
    table(["pass", "s", "predicted", "ratio", "peak GiB", "predicted", "ratio"], rows)


if __name__ == "__main__":
    main()
