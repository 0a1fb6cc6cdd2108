"""Run three recipes in sequence, each on the merged model of the last, and measure forgetting.

    python benchmarks/continual.py [--steps 150] [--items 150]

The embedded model learns word problems of one step, then of two, then of three. The first round
prunes and quantizes; the later ones keep its zeros and grid. After each round the OpenVINO
deployment answers held-out problems of all three kinds; the first column shows how much later
rounds forget. ``verify`` compares every code of every round. This script checks that the zeros of
the first round are zeros in the last.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from document import finish, table

from sqft_export.data.items import Data, first_of_every_set, load_tokenizer, stop_ids
from sqft_export.data.scoring import judge, questions
from sqft_export.measure.jobs import MeasuredModel, Requests, requested
from sqft_export.measure.statistics import wilson
from sqft_export.measure.worker import measure_in_process
from sqft_export.metrics import SparsityMetrics, read_metrics
from sqft_export.model.storage import load_mask_bits
from sqft_export.recipe.load import load_recipe
from sqft_export.recipe.schema import Recipe
from sqft_export.run.pipeline import run_recipe

ROOT = Path(__file__).parent.parent
TINY = ROOT / "sqft_export" / "builtin" / "tiny"
KINDS = {"one-step": 1, "two-steps": 2, "three-steps": 3}
GIVEN = ("sparsify={method: existing}", "quantize.method=existing")


def write_kinds(folder: Path) -> None:
    """Write ``<kind>-train.jsonl`` and ``-test.jsonl``, by the equations per answer."""
    for split in ("train", "test"):
        lines = (TINY / f"{split}.jsonl").read_text().splitlines()
        for kind, steps in KINDS.items():
            chosen = [line for line in lines if json.loads(line)["answer"].count("=") == steps]
            (folder / f"{kind}-{split}.jsonl").write_text("\n".join(chosen) + "\n")


def recipe_of(kind: str, data: Path, base: Path | None, steps: int, items: int) -> Recipe:
    settings = (
        f"task.train={data / kind}-train.jsonl",
        f"task.test={data / kind}-test.jsonl",
        f"name={kind}",
        f"adapt.steps={steps}",
        f"benchmark.items={items}",
        "benchmark.baselines=[]",
        "export={targets: [openvino]}",
    )
    return load_recipe(ROOT / "recipes" / "tiny.yaml", settings + (GIVEN if base else ()), base)


def accuracy(folder: Path, recipe: Recipe) -> tuple[int, int]:
    """Return the number of problems that a deployment answers right, and the number of problems."""
    tokenizer = load_tokenizer(TINY)
    items = first_of_every_set(Data(recipe, tokenizer).test, recipe.benchmark.items)
    model = MeasuredModel(kind="openvino", folder=folder, threads=None, device="cpu")
    requests = Requests(questions=questions(recipe, items, stop_ids(folder, tokenizer)))
    scores = requested(measure_in_process(model, requests).scores)
    judged = judge(recipe, items, scores, tokenizer)
    return sum(one.right for one in judged), len(judged)


def rounds(root: Path, steps: int, items: int) -> list[dict[str, Any]]:
    """Return kind, zeros and right answers per kind of problem for every round."""
    write_kinds(root)
    found: list[dict[str, Any]] = []
    base, first = None, None
    for number, kind in enumerate(KINDS, start=1):
        recipe = recipe_of(kind, root, base, steps, items)
        artifacts = run_recipe(recipe, root / f"round-{number}", ("verify",))
        base = artifacts["merge"].path / "model"
        masks = load_mask_bits(artifacts["sparsify"].path)
        first = first or masks
        # Rounding may make zeros too, so that a later mask is inside the first.
        regrown = sum(int((mask & ~first[name]).sum()) for name, mask in masks.items())
        scores = {
            k: accuracy(
                artifacts["export-openvino"].path / "model", recipe_of(k, root, base, steps, items)
            )
            for k in KINDS
        }
        sparsity = read_metrics(artifacts["merge"], SparsityMetrics).sparsity["all"]
        found.append({"learned": kind, "sparsity": sparsity, "regrown": regrown, "right": scores})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--items", type=int, default=150)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = rounds(Path(scratch), arguments.steps, arguments.items)
    rows = []
    for number, entry in enumerate(found, start=1):
        cells = []
        for right, count in entry["right"].values():
            low, high = wilson(right, count)
            cells.append(f"{right / count:.1%} ({low:.0%} to {high:.0%})")
        rows.append(
            [number, entry["learned"], f"{entry['sparsity']:.2%}", entry["regrown"], *cells]
        )
    table(["round", "learned", "zeros", "zeros lost", *KINDS], rows)
    finish("continual", {}, {"rounds": found})


if __name__ == "__main__":
    main()
