"""Speed of passes on two processes and of sweeps on two Ray workers; the work that a kill loses.

    python benchmarks/scaling.py --out <new folder> [--part processes|ray|kill|nodes] [--small]

processes: the passes sparsify, quantize and search of the embedded recipe with one and two
processes of one thread, interleaved. ray: a sweep of two rank sets and four learning rates on one
shared base, with one and two processors. kill: the run is killed in the middle of every pass; the
lost work is the time of the killed pass after its last saved state. nodes: the predicted hours of
eight recipes of Mistral-7B on 1, 2, 4 and 8 machines, next to the ideal. It takes the pass times
of ``--times`` (JSON, pass -> seconds), else those below, which are to be replaced by measured ones.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from document import finish, spread, table

from sqft_export.run.schedule import TimedPass, ideal_seconds, predict_makespan

ROOT = Path(__file__).parent.parent
RECIPE = str(ROOT / "recipes" / "tiny.yaml")
BIN = Path(sys.executable).parent
PARTS = ("processes", "ray", "kill", "nodes")
SEARCHED = ("search.strategy=hill-climb", "search.budget=8")
SMALL = ("calibration.samples=16", "adapt.steps=12", "adapt.batch=8", "benchmark.items=8")
# Small other passes, so that the adapt passes dominate.
LEAN = (
    *("export.targets=[openvino]", "export.sparse_files=false", "export.sparse_execution=false"),
    *("benchmark.baselines=[merged]", "benchmark.items=20", "benchmark.repeats=2"),
    *("benchmark.rounds=1", "verify.prompts=4"),
)
AXES = (
    *("--over", "adapt.ranks=[32,24,16],[16,12,8]"),
    *("--over", "adapt.learning_rate=5e-4,1e-3,2e-3,4e-3"),
)
WORKER = """
import sys
from pathlib import Path
from sqft_export.recipe.load import load_recipe
from sqft_export.run.pipeline import run_recipe
run_recipe(load_recipe(Path(sys.argv[1]), tuple(sys.argv[4:])), Path(sys.argv[2]), (sys.argv[3],))
"""
# Seconds of each pass of recipes/mistral.yaml; --times replaces them.
ASSUMED = {
    "sparsify": 900.0,
    "quantize": 2400.0,
    "adapt": 14400.0,
    "search": 900.0,
    "merge": 300.0,
    "export-openvino": 300.0,
    "export-onnx": 300.0,
    "export-gguf": 200.0,
    "verify": 900.0,
    "benchmark": 3600.0,
    "report": 10.0,
}
PARENTS = {
    "quantize": ("sparsify",),
    "adapt": ("sparsify", "quantize"),
    "search": ("adapt",),
    "merge": ("search",),
    "export-openvino": ("merge",),
    "export-onnx": ("merge",),
    "export-gguf": ("merge",),
    "verify": ("export-openvino", "export-onnx", "export-gguf"),
    "benchmark": ("export-openvino", "export-onnx", "export-gguf"),
    "report": ("verify", "benchmark"),
}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def seconds_of_passes(root: Path) -> dict[str, float]:
    """Seconds of every sealed pass in a run's folder, by the name of its artifact."""
    files = root.glob("*/manifest.json")
    return {file.parent.name: json.loads(file.read_text())["seconds"] for file in files}


def run_passes(folder: Path, last: str, count: int, settings: tuple[str, ...]) -> dict[str, float]:
    """Run the recipe up to a pass in ``count`` processes; return pass -> seconds."""
    script = folder.parent / "worker.py"
    script.write_text(WORKER)
    launcher = [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={count}"]
    command = [*(launcher if count > 1 else [sys.executable]), str(script)]
    arguments = [RECIPE, str(folder), last, *settings]
    subprocess.run([*command, *arguments], cwd=ROOT, env=environment(), check=True)
    found = seconds_of_passes(folder)
    return {name.rpartition("-")[0]: seconds for name, seconds in found.items()}


def measure_processes(out: Path, rounds: int, settings: tuple[str, ...]) -> tuple[dict, dict]:
    """Ratios of the seconds with one process to those with two, per pass."""
    samples: dict[str, dict[int, list[float]]] = {}
    for number in range(rounds):
        for count in (1, 2) if number % 2 == 0 else (2, 1):
            folder = out / f"processes-{number}-{count}"
            times = run_passes(folder, "search", count, (*settings, *SEARCHED))
            for name in ("sparsify", "quantize", "search"):
                samples.setdefault(name, {1: [], 2: []})[count].append(times[name])
            shutil.rmtree(folder)
    ratios = {
        f"{name}_one_over_two_processes": spread(
            [one / two for one, two in zip(found[1], found[2], strict=True)]
        )
        for name, found in samples.items()
    }
    return ratios, samples


def measure_ray(out: Path, settings: tuple[str, ...]) -> tuple[dict, dict]:
    """Time of a sweep with one and two processors; every pass runs once."""
    taken, passes = {}, {}
    for count in (1, 2):
        folder = out / f"ray-{count}"
        command = [
            *("taskset", "-c", ",".join(map(str, range(count)))),
            *(str(BIN / "sqft-export"), "sweep", RECIPE, *settings, *LEAN, *AXES),
            *("--ray", "--threads", "1", "--runs", str(folder)),
        ]
        started = time.monotonic()
        subprocess.run(command, cwd=ROOT, env=environment(), check=True)
        taken[count] = time.monotonic() - started
        passes[count] = seconds_of_passes(folder / "tiny")
    names = [name.rpartition("-")[0] for name in passes[2]]
    once = {name: names.count(name) for name in set(names)}
    assert once["sparsify"] == once["quantize"] == 1 and once["adapt"] == 8, once
    return {"ray_one_over_two_workers": spread([taken[1] / taken[2]])}, {
        "seconds": taken,
        "passes": passes,
    }


def measure_kills(out: Path, settings: tuple[str, ...]) -> dict[str, float]:
    """Kill a run in the middle of every pass; return pass -> seconds of work done twice."""
    folder = out / "kill"
    whole = run_command(out / "whole", settings)
    lost = {}
    for artifact, seconds in whole.items():
        name = artifact.rpartition("-")[0]
        process = start_command(folder, settings)
        partial = folder / "tiny" / f"{artifact}.partial"
        while not partial.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(seconds / 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = seconds_of_passes(folder / "tiny").get(artifact)
        again = run_command(folder, settings)[artifact]
        lost[name] = 0.0 if before else again - seconds / 2
        shutil.rmtree(folder)
    return lost


def start_command(folder: Path, settings: tuple[str, ...]) -> subprocess.Popen:
    command = [str(BIN / "sqft-export"), "run", RECIPE, *settings, *LEAN, "--runs", str(folder)]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=quiet, stderr=quiet)


def run_command(folder: Path, settings: tuple[str, ...]) -> dict[str, float]:
    assert start_command(folder, settings).wait() == 0
    return seconds_of_passes(folder / "tiny")


def recipes_of_mistral(times: dict[str, float]) -> dict[str, TimedPass]:
    """Eight recipes that share sparsify and quantize and train with other settings."""
    passes = {}
    for number in range(8):

        def key(name: str, number: int = number) -> str:
            return name if name in ("sparsify", "quantize") else f"{name}-{number}"

        for name, seconds in times.items():
            parents = tuple(key(p) for p in PARENTS.get(name, ()) if p in times)
            passes[key(name)] = TimedPass(seconds, parents)
    return passes


def predict_nodes(times: dict[str, float]) -> dict[int, dict[str, float]]:
    """Hours of eight recipes on 1, 2, 4 and 8 machines: predicted and ideal."""
    passes = recipes_of_mistral(times)
    return {
        count: {
            "hours": predict_makespan(passes, count) / 3600,
            "ideal": ideal_seconds(passes, count) / 3600,
        }
        for count in (1, 2, 4, 8)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder for all runs")
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all parts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="fewer samples and steps")
    parser.add_argument("--times", type=Path, help="JSON of measured seconds: pass -> seconds")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    settings = SMALL if options.small else ()
    ratios: dict[str, dict[str, float]] = {}
    values: dict[str, object] = {}
    for part in options.part or PARTS:
        if part == "processes":
            found, values[part] = measure_processes(options.out, options.rounds, settings)
            ratios |= found
        elif part == "ray":
            found, values[part] = measure_ray(options.out, settings)
            ratios |= found
        elif part == "kill":
            values["lost_seconds"] = measure_kills(options.out, settings)
        else:
            times = json.loads(options.times.read_text()) if options.times else ASSUMED
            values[part] = predicted = predict_nodes(times)
            rows = [[count, row["hours"], row["ideal"]] for count, row in predicted.items()]
            table(["machines", "hours", "ideal"], rows)
    finish("scaling", ratios, values)


if __name__ == "__main__":
    main()
