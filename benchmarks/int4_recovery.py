"""Accuracy of INT4-sparse relative to float-sparse, for each option of adapt.

    python benchmarks/int4_recovery.py --recipes tiny stories --seeds 0 1 2 --set adapt.steps=60
    python benchmarks/int4_recovery.py --recipes stories --set model.path=<folder> task.text=<file>

Tunes the same recipe with each option and three seeds. Prints the accuracy of the merged model on
held-out items (exact match, or tokens predicted right), in points below float-sparse
(``sparsepeft``) of the same seed. ``--set`` overrides fields of every recipe; ``--runs`` keeps the
runs, so that a second call resumes.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

from document import finish, spread, table

from sqft_export.data.items import Data, first_of_every_set, load_tokenizer, stop_ids
from sqft_export.data.scoring import accuracy_of, judge, questions
from sqft_export.measure.likelihood import score
from sqft_export.recipe.load import load_recipe
from sqft_export.recipe.schema import Recipe
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets import target

ROOT = Path(__file__).parent.parent
FLOATS = ("quantize.method=none", "adapt.pipeline=sparsepeft")
SCALES = ("adapt.trainable_scales=true",)
DENSE, LORA = ("adapt.distill.teacher=dense",), ("adapt.distill.teacher=dense-lora",)
VARIANTS = {
    "float-sparse (sparsepeft)": FLOATS,
    "INT4 from rounding to nearest": ("quantize.method=rtn",),
    "INT4 from GPTQ": (),
    "INT4, NNCF's grid": ("quantize.method=nncf",),
    "INT4, trainable scales": SCALES,
    "INT4, teacher dense": DENSE,
    "INT4, teacher dense + LoRA": LORA,
    "INT4, scales and teacher dense": (*SCALES, *DENSE),
}


def accuracy(recipe: Recipe, folder: Path) -> dict[str, float]:
    """Accuracy in percent and perplexity of a Hugging Face folder on the recipe's test items."""
    tokenizer = load_tokenizer(folder)
    items = first_of_every_set(Data(recipe, tokenizer).test, recipe.benchmark.items)
    found = score(
        target("torch").open_session(folder, True, None),
        questions(recipe, items, stop_ids(folder, tokenizer)),
    )
    share = accuracy_of(judge(recipe, items, found, tokenizer), found)
    return {"accuracy": 100 * share, "perplexity": found.perplexity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=["tiny", "stories"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], help="such as adapt.steps=60")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "int4_recovery")
    arguments = parser.parse_args()
    rows, ratios, values = [], {}, {}
    for name in arguments.recipes:
        found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
        for seed in arguments.seeds:
            for variant, settings in VARIANTS.items():
                overrides = (f"seed={seed}", "benchmark.baselines=[]", *arguments.set, *settings)
                recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides)
                artifacts = run_recipe(recipe, arguments.runs / name, ("merge",))
                folder = artifacts["merge"].path / "model"
                found[variant].append(accuracy(recipe, folder))
        floats = [entry["accuracy"] for entry in found["float-sparse (sparsepeft)"]]
        for variant, entries in found.items():
            reached = [entry["accuracy"] for entry in entries]
            under = [a - b for a, b in zip(floats, reached, strict=True)]
            perplexity = mean(entry["perplexity"] for entry in entries)
            deviation = stdev(reached) if len(reached) > 1 else 0.0
            rows.append([name, variant, mean(reached), deviation, perplexity, mean(under)])
            ratios[f"{name}: {variant}"] = spread(
                [a / b for a, b in zip(reached, floats, strict=True)]
            )
            values[f"{name}: {variant}"] = {"runs": entries, "points_under_float": under}
    header = ["model", "variant", "accuracy %", "std dev", "perplexity", "points under float"]
    table(header, rows)
    finish("int4_recovery", ratios, values)


if __name__ == "__main__":
    main()
