"""Quality, bytes and time of different mask structures.

    python benchmarks/mask_structure.py [--recipe <file>] [--model-path <folder>] [--runs <folder>]
        [setting ...]

Runs one recipe up to its benchmark with every structure: any mask, at most 32 of every 64 inputs,
2:4 and 4:8 at 50 %, and the first two at 60 %. Prints perplexity and accuracy on the recipe's test
items, of the pruned model before tuning and of the merged model; bytes of the OpenVINO files, dense
and in our kernels' layout; milliseconds per output token (median, 10th and 90th percentile) with
the runtime's kernels and with ours. Linears whose inputs a block does not divide get any mask of
the same sparsity. `--runs` keeps the runs, so that a second call resumes.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from document import finish, table

from sqft_export.model.hub import model_folder
from sqft_export.plan.layout import layout_of
from sqft_export.recipe.load import load_recipe
from sqft_export.run.pipeline import run_recipe

STRUCTURES: dict[str, dict[str, Any]] = {
    "any, 50 %": {"sparsity": 0.5},
    "at most 32 of 64, 50 %": {"sparsity": 0.5, "at_most": [32, 64]},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
    "any, 60 %": {"sparsity": 0.6},
    "at most 32 of 64, 60 %": {"sparsity": 0.6, "at_most": [32, 64]},
}
FIXED = (
    "benchmark.baselines=[dense,sparse,merged]",
    "export.targets=[openvino]",
    "export.sparse_files=true",
    "export.sparse_execution=true",
)
STOCK, OURS = "OpenVINO", "OpenVINO, sparse execution"


def block_of(structure: dict[str, Any]) -> int:
    if "pattern" in structure:
        return int(structure["pattern"].partition(":")[2])
    return structure.get("at_most", [1, 1])[1]


def setting_of(structure: dict[str, Any], linears: dict[str, tuple[int, int]]) -> str:
    """Return the setting ``sparsify=...`` of a structure."""
    block, sparsity = block_of(structure), structure.get("sparsity", 0.5)
    undivided = {name.rpartition(".")[2] for name, size in linears.items() if size[1] % block}
    section: dict[str, Any] = {"method": "wanda", **structure}
    if undivided:
        section["overrides"] = [{"modules": sorted(undivided), "sparsity": sparsity}]
    return f"sparsify={json.dumps(section)}"


def time_of(row: dict[str, Any]) -> str:
    token = row["tpot"]
    return f"{token['median_ms']:.3g} ({token['p10_ms']:.3g} to {token['p90_ms']:.3g})"


def measured(rows: list[dict[str, Any]]) -> dict[str, Any]:
    by_name = {row["name"]: row for row in rows}
    found = {
        "pruned perplexity": by_name["sparse"]["perplexity"],
        "pruned accuracy": by_name["sparse"]["accuracy"],
        "tuned perplexity": by_name["merged"]["perplexity"],
        "tuned accuracy": by_name["merged"]["accuracy"],
        "MB dense": by_name[STOCK]["file_bytes"] / 1e6,
        "TPOT stock": time_of(by_name[STOCK]),
    }
    if OURS in by_name:
        found["MB sparse"] = by_name[OURS]["file_bytes"] / 1e6
        found["TPOT sparse"] = time_of(by_name[OURS])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/tiny.yaml"))
    parser.add_argument("--model-path", type=Path)
    parser.add_argument("--runs", type=Path, help="folder that keeps the runs")
    parser.add_argument("settings", nargs="*", help="recipe settings, such as adapt.steps=60")
    arguments = parser.parse_args()
    plain = load_recipe(arguments.recipe, tuple(arguments.settings), arguments.model_path)
    folder = model_folder(plain, download=False)
    linears = layout_of(plain, folder).linears
    values: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        runs = arguments.runs or Path(scratch)
        for name, structure in STRUCTURES.items():
            settings = (*arguments.settings, *FIXED, setting_of(structure, linears))
            recipe = load_recipe(arguments.recipe, settings, arguments.model_path)
            made = run_recipe(recipe, runs, ("benchmark",))["benchmark"]
            results = json.loads((made.path / "results.json").read_text())
            values[name] = measured(results["rows"])
            dense = results["rows"][0]
    print(f"dense: perplexity {dense['perplexity']:.4g}, accuracy {dense['accuracy']:.3f}")
    columns = list(next(iter(values.values())))
    table(["structure", *columns], [[name, *found.values()] for name, found in values.items()])
    any_mask = {end: values[f"any, {end}"] for end in ("50 %", "60 %")}
    ratios = {}
    for name, found in values.items():
        over = any_mask["60 %" if name.endswith("60 %") else "50 %"]
        ratio = found["tuned perplexity"] / over["tuned perplexity"]
        ratios[f"{name}: tuned perplexity over any mask"] = {"median": ratio}
    finish("mask_structure", ratios, values)


if __name__ == "__main__":
    main()
