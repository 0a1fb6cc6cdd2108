"""A real model on real tasks: loss by sparsity and few bits, and recovery by tuning.

    python benchmarks/real_model.py --model <Hugging Face folder> --data <folder of sets> \\
        --text <plain text> [--sets arc_easy] [--seeds 0 1 2] [--set adapt.steps=60]

Runs `recipes/smollm2.yaml` with the variants below, each tuned equally from every seed. Every row
is measured in torch in float32:

- accuracy on held-out items, by likelihood and by likelihood per character;
- in how many seeds a paired test finds a difference to dense + LoRA, or to the row of ``--beside``;
- the p-value of one paired permutation test over the answers of all seeds to the same items;
- perplexity on the text, with mean KL divergence and equal top-1 tokens against the dense base;
- bits per weight of the packed OpenVINO file (its entropy level), over all weights.

``--runs`` keeps the runs, so that a second call resumes. ``--deployed`` also exports QA-SparsePEFT
of the first seed for every runtime, and measures the files on this machine: accuracy, agreement
with the dense base, size, tokens per second, time to first token and resident memory.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from document import finish, spread, table
from scipy.stats import permutation_test
from torch import Tensor

from sqft_export.data.items import Data, Item, first_of_every_set, load_tokenizer, stop_ids
from sqft_export.data.scoring import accuracy_by_set, judge, questions
from sqft_export.machine.device import device_of
from sqft_export.measure.likelihood import score
from sqft_export.measure.statistics import mcnemar
from sqft_export.metrics import ExportMetrics, read_metrics
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.floats import load_model
from sqft_export.recipe.load import load_recipe
from sqft_export.recipe.schema import Recipe
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets.torch import TorchSession

ROOT = Path(__file__).parent.parent
WINDOW, WINDOWS = 256, 32
CHARACTERS = 16 * WINDOW * WINDOWS  # of the text: enough for them
DENSE, LORA, TUNED = "dense", "dense + LoRA", "QA-SparsePEFT"
FLOATS, UNPRUNED = "quantize={method: none}", "sparsify={method: none}"
UNTUNED = "adapt=none"
BEFORE, THROUGH_GRID = "sparsify.reconstruct={}", "quantize.reconstruct={}"
# What is made of the base, and the pass that makes it.
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    LORA: ("teacher", ("benchmark.baselines=[dense-lora]",)),
    "dense INT4": ("merge", (UNPRUNED, UNTUNED)),
    "dense INT4, reconstructed": ("merge", (UNPRUNED, THROUGH_GRID, UNTUNED)),
    "dense INT4, tuned": ("merge", (UNPRUNED,)),
    "dense INT3, tuned": ("merge", (UNPRUNED, "quantize.bits=3")),
    "sparse": ("merge", (FLOATS, UNTUNED)),
    "sparse, reconstructed": ("merge", (FLOATS, BEFORE, UNTUNED)),
    "sparse INT4": ("merge", (UNTUNED,)),
    "sparse INT4, reconstructed before": ("merge", (BEFORE, UNTUNED)),
    "sparse INT4, reconstructed": ("merge", (THROUGH_GRID, UNTUNED)),
    "SparsePEFT": ("merge", (FLOATS, "adapt.pipeline=sparsepeft")),
    TUNED: ("merge", ()),
    f"{TUNED}, reconstructed": ("merge", (THROUGH_GRID,)),
    f"{TUNED}, 60 %": ("merge", ("sparsify.sparsity=0.6",)),
    f"{TUNED}, bounded blocks": ("merge", ("sparsify.at_most=[32, 64]",)),
    f"{TUNED}, 2:4": ("merge", ("sparsify.sparsity=null", "sparsify.pattern='2:4'")),
}
COMPARED = (DENSE, *ROWS)
# QA-SparsePEFT with one setting added or changed: rows that run only if `--rows` lists them.
ALTERED = {
    "distilled": ("adapt.distill={}",),
    "distilled, layers too": ("adapt.distill={layers: 1}",),
    "distilled from LoRA": ("adapt.distill={teacher: dense-lora}",),
    "trainable scales": ("adapt.trainable_scales=true",),
    "rate 1e-3": ("adapt.learning_rate=1e-3",),
    "fixed ranks": ("adapt.elastic=false", "search.strategy=maximal"),
    "Wanda": ("sparsify.method=wanda",),
    "allocation": ("sparsify.allocation=output-error",),
    "NNCF": ("quantize.method=nncf",),
}
ROWS |= {f"{TUNED}, {name}": ("merge", settings) for name, settings in ALTERED.items()}
PACKED = (
    "export={targets: [openvino], sparse_files: true, entropy: true}",
    "benchmark.baselines=[]",  # no row needs another's training
)
FILES = (
    "export={targets: [openvino, onnx, gguf], sparse_files: true, sparse_execution: true}",
    "benchmark.baselines=[dense, merged]",
)


def windows(folder: Path, text: Path) -> list[Tensor]:
    some = text.read_text()[:CHARACTERS]
    ids = load_tokenizer(folder)(some, add_special_tokens=False)["input_ids"]
    starts = range(0, len(ids) - WINDOW, WINDOW)
    return [torch.tensor([ids[at : at + WINDOW]]) for at in starts][:WINDOWS]


@torch.no_grad()
def logits(folder: Path, asked: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Log probabilities ``[length, vocabulary]`` after every window's tokens."""
    model = load_model(Checkpoint(folder), torch.float32).to(device)
    for ids in asked:
        found = model(input_ids=ids.to(device), use_cache=False).logits[0]
        yield found.float().log_softmax(-1).cpu()


def on_text(
    folder: Path, base: Path, asked: list[Tensor], device: torch.device
) -> dict[str, float]:
    """Perplexity; divergence from the base, in nats; share of tokens that both rank first."""
    loss = away = same = tokens = 0.0
    both = logits(folder, asked, device), logits(base, asked, device)
    for ids, ours, theirs in zip(asked, *both, strict=True):
        loss -= float(ours[:-1].gather(1, ids[0, 1:, None]).sum())
        away += float((theirs.exp() * (theirs - ours)).sum())
        same += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        tokens += len(ours)
    perplexity = math.exp(loss / (tokens - len(asked)))
    return {"perplexity": perplexity, "kl_nats": away / tokens, "same_top": 100 * same / tokens}


def on_items(recipe: Recipe, folder: Path, items: list[Item]) -> dict[str, Any]:
    """Accuracy in percent, the mean over sets, and what was answered right."""
    tokenizer = load_tokenizer(folder)
    asked = questions(recipe, items, stop_ids(folder, tokenizer))
    device = device_of(recipe.device)
    session = TorchSession(load_model(Checkpoint(folder)).to(device), str(device))
    judged = judge(recipe, items, score(session, asked), tokenizer)
    sets = accuracy_by_set(judged)
    return {
        "accuracy": 100 * mean(s.accuracy for s in sets.values()),
        "accuracy_normalized": 100 * mean(s.accuracy_normalized for s in sets.values()),
        "by_set": {name: found.to_json() for name, found in sets.items()},
        "right": [answer.right for answer in judged],
    }


class Experiment:
    """The runs and figures of every row, kept below ``runs``."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.base = arguments, arguments.model
        self.asked = windows(self.base, arguments.text)
        self.weights = Checkpoint(self.base).parameters

    def recipe(self, seed: int, *settings: str) -> Recipe:
        given = self.arguments
        sets = (f"task.name={given.sets}", f"task.folder={given.data.resolve()}")
        overrides = (f"seed={seed}", *sets, *given.set, *PACKED, *settings)
        return load_recipe(ROOT / "recipes" / "smollm2.yaml", overrides, self.base)

    def figures(self, name: str, seed: int) -> dict[str, Any]:
        of = seed if name in ROWS else "base"  # which is the same for all
        file = self.arguments.runs / f"{name.replace(' ', '-')}-{of}.json"
        if not file.is_file():
            found = self._measured(name, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found))
        return json.loads(file.read_text())

    def _measured(self, name: str, seed: int) -> dict[str, Any]:
        made, settings = ROWS.get(name, ("", ()))
        recipe = self.recipe(seed, *settings)
        folder, stored = self.base, 16 * self.weights
        if made:
            last = "export-openvino" if made == "merge" else made
            artifacts = run_recipe(recipe, self.arguments.runs / "made", (last,))
            folder = artifacts[made].path / ("model" if made == "merge" else "dense-lora")
            exported = artifacts[last] if last == "export-openvino" else None
            if exported and (packed := read_metrics(exported, ExportMetrics).packed):
                stored = 8 * packed.packed_bytes
        items = first_of_every_set(
            Data(recipe, load_tokenizer(self.base)).test, recipe.benchmark.items
        )
        device = device_of(recipe.device)
        found = on_items(recipe, folder, items) | on_text(folder, self.base, self.asked, device)
        return found | {"bits_per_weight": stored / self.weights}

    def deployed(self, seed: int) -> list[dict[str, Any]]:
        """Rows of a benchmark of every runtime's files."""
        recipe = self.recipe(seed, *FILES)
        made = run_recipe(recipe, self.arguments.runs / "made", ("benchmark",))["benchmark"]
        return json.loads((made.path / "results.json").read_text())["rows"]


def file_row(row: dict[str, Any]) -> list[Any]:
    near = [row.get(other, {}) for other in ("beside_dense", "beside_merged")]
    return [
        *(row["name"], 100 * row["accuracy"]),
        *(100 * found["agreement"] if found else "" for found in near),
        *(found.get("kl_nats", "") for found in near),
        *(row["bits_per_weight"], row["file_bytes"] / 1e6, 1000 / row["tpot"]["median_ms"]),
        *(row["ttft"]["median_ms"], row["steady_memory_bytes"] / 1e6),
    ]


def p_value(runs: list[dict[str, Any]], beside: list[dict[str, Any]]) -> float:
    """That both rows answer alike: an item's share of seeds, swapped between the rows."""
    shares = [np.mean([run["right"] for run in row], axis=0) for row in (runs, beside)]
    found = permutation_test(
        shares, lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples", rng=0
    )
    return float(found.pvalue)


def row_of(name: str, runs: list[dict[str, Any]], beside: list[dict[str, Any]]) -> list[Any]:
    reached = [run["accuracy"] for run in runs]
    told = sum(mcnemar(a["right"], b["right"]) < 0.05 for a, b in zip(runs, beside, strict=True))
    tests = (f"{told} of {len(runs)}", p_value(runs, beside))
    figures = ("accuracy_normalized", "perplexity", "kl_nats", "same_top", "bits_per_weight")
    return [
        *(name, mean(reached), stdev(reached) if len(reached) > 1 else 0.0),
        *(*tests, *(mean(run[figure] for run in runs) for figure in figures)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sets", default="arc_easy", help="the name of a task, or commonsense")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=[DENSE, *ROWS], default=COMPARED)
    parser.add_argument("--beside", choices=[DENSE, *ROWS], default=LORA, help="of paired tests")
    parser.add_argument("--set", nargs="+", default=[], help="such as adapt.steps=60")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "real_model")
    parser.add_argument("--deployed", action="store_true", help="every runtime's files too")
    arguments = parser.parse_args()
    experiment, rows, ratios, values = Experiment(arguments), [], {}, {}
    beside = [experiment.figures(arguments.beside, seed) for seed in arguments.seeds]
    for name in arguments.rows:
        runs = [experiment.figures(name, seed) for seed in arguments.seeds]
        rows.append(row_of(name, runs, beside))
        ratios[f"{name}: accuracy over {arguments.beside}"] = spread(
            [a["accuracy"] / b["accuracy"] for a, b in zip(runs, beside, strict=True)]
        )
        values[name] = [{k: v for k, v in run.items() if k != "right"} for run in runs]
    header = ["row", "accuracy %", "std dev", "differs from it", "p, all seeds", "acc_norm %"]
    print(f"paired tests against {arguments.beside}")
    table([*header, "perplexity", "KL nats", "same top %", "bits/weight"], rows)
    if arguments.deployed:
        values["deployed"] = experiment.deployed(arguments.seeds[0])
        header = ["files", "accuracy %", "same % as dense", "as merged", "KL to dense"]
        files = [file_row(row) for row in values["deployed"]]
        header += ["to merged", "bits/weight", "MB", "tokens/s", "TTFT ms", "memory MB"]
        table(header, files)
    finish("real_model", ratios, values)


if __name__ == "__main__":
    main()
