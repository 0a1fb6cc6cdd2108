"""Whether tuning through the grid pays off: compared with LoRA, merged and quantized afterwards.

    python benchmarks/worth.py --model <Hugging Face folder> --data <folder of tasks> --quick
    python benchmarks/worth.py --model <folder> --data <folder> --seeds 0 1 2 --steps 300 900 1800

``--data`` has the folders of the tasks:

    banking77     customer messages, answered with one of 77 intents; ``{train,test}.csv``
    nlupp         customer messages, answered with intents and slots as JSON; ``*.jsonl``
    commonsense   multiple choice of the LLM-Adapters collection, ``llm_adapters/<set>/*.json``
    mawps         word problems, answered with their equation; ``llm_adapters/mawps/*set.json``

All become conversations, rendered by the model's chat template. Every row is a deployment in its
runtime; all but the first two are llama.cpp files:

    base                        the model as it is, in torch
    lora                        LoRA in floats, in torch
    lora_then_q4_k_m, ..._q3_k_m, ..._int4   LoRA, merged, then quantized; int4 is our GPTQ
    dense_int4, sparse_int4     tuned through the grid, without zeros and with 50 %

All rows train with the same settings on the same examples. ``--steps`` are the points of the
learning curve, each a training of its own. The last ``--validation`` training items are held out:
every row gets the number of steps that is best on them. The tables and p-values are from the test
items alone. Differences are paired: the same items, averaged over seeds.

Every task, row, seed and number of steps leaves a file below ``--runs``. A second call resumes.
``--quick`` takes about 20 minutes on two quiet cores: BANKING77, one seed, one number of steps.
"""

import argparse
import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from document import finish, table

from sqft_export.artifacts.store import Artifact
from sqft_export.data.items import Data, answer_stops, load_tokenizer
from sqft_export.data.scoring import judge, questions
from sqft_export.measure.jobs import MeasuredModel, Requests, requested
from sqft_export.measure.rows import stored_bytes
from sqft_export.measure.worker import measure_in_process
from sqft_export.recipe.load import parse_recipe
from sqft_export.recipe.schema import Recipe
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets.folder import context_of

Arguments = argparse.Namespace
TASKS = ("banking77", "nlupp", "commonsense", "mawps")
# Sets of the collection that have training rows.
CHOICES = ("ARC-Challenge", "ARC-Easy", "boolq", "openbookqa")
REFERENCE = "lora_then_q4_k_m"
RESAMPLES = 10_000
BANKING_SYSTEM = "Name the intent of the customer's message to a bank. Answer with one intent."
EQUATION_SYSTEM = "Write the equation that solves the problem."
UNPRUNED, SPARSE = {"method": "none"}, {"method": "sparsegpt", "sparsity": 0.5}


@dataclass(frozen=True)
class Measured:
    """A row of the table: how it is made and where its deployment is.

    last: pass that writes it; None for the base model.
    folder: in the artifact of that pass.
    sparsify: section of the recipe.
    peers: baselines of the recipe.
    """

    runtime: Literal["torch", "gguf"]
    last: str | None
    folder: str = ""
    sparsify: Any = None
    peers: tuple[str, ...] = ()


FILES = ("lora-then-q4_k_m", "lora-then-q3_k_m")
ROWS = {
    "base": Measured("torch", None),
    "lora": Measured("torch", "teacher", "dense-lora", UNPRUNED, ("dense-lora",)),
    REFERENCE: Measured("gguf", "peers-gguf", FILES[0], UNPRUNED, FILES),
    "lora_then_q3_k_m": Measured("gguf", "peers-gguf", FILES[1], UNPRUNED, FILES),
    "lora_then_int4": Measured(
        "gguf", "peers-grid", "lora-then-int4-gguf", UNPRUNED, ("lora-then-int4",)
    ),
    "dense_int4": Measured("gguf", "export-gguf", "model", UNPRUNED),
    "sparse_int4": Measured("gguf", "export-gguf", "model", SPARSE),
}


def conversation(user: str, assistant: str, system: str | None = None) -> dict[str, Any]:
    """A row of a file of conversations, with one answer."""
    texts = {"system": system, "user": user, "assistant": assistant}
    return {"messages": [{"role": r, "content": t} for r, t in texts.items() if t is not None]}


def read_json(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON or jsonl file."""
    text = file.read_text()
    return (
        [json.loads(line) for line in text.splitlines()]
        if file.suffix == ".jsonl"
        else (json.loads(text))
    )


def read_task(task: str, data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The conversations of a task: training and test rows."""
    folder = data / task
    if task == "nlupp":
        train, test = (
            [{"messages": row["messages"]} for row in read_json(folder / f"{split}.jsonl")]
            for split in ("train", "test")
        )
    elif task == "banking77":
        train, test = (list(_intents(folder / f"{split}.csv")) for split in ("train", "test"))
    elif task == "mawps":
        folder = data / "llm_adapters" / "mawps"
        train = list(_equations(read_json(folder / "trainset.json")))
        rest = (read_json(folder / f"{split}set.json") for split in ("valid", "test"))
        test = [row for rows in rest for row in _equations(rows)]
    else:
        collection = data / "llm_adapters"
        train = [row for name in CHOICES for row in _choices(collection / name / "train.json")]
        test = [row for name in CHOICES for row in _choices(collection / name / "test.json")]
    return train, test


def _intents(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            yield conversation(row["text"], row["category"], BANKING_SYSTEM)


def _equations(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        equation = row["equation"].lower().replace(" ", "")
        yield conversation(row["original_text"], equation, EQUATION_SYSTEM)


def _choices(file: Path) -> Iterator[dict[str, Any]]:
    for row in read_json(file):
        yield conversation(row["instruction"], row["output"])


def write_task(task: str, arguments: Arguments) -> None:
    """Write ``train.jsonl``, and ``test.jsonl``: first the validation items, then the test items.

    Test items are evenly spread, since the test files are sorted by set or intent.
    """
    folder, items, held_out = arguments.runs / task, arguments.items, arguments.validation
    train, test = read_task(task, arguments.data)
    np.random.default_rng(0).shuffle(train)
    chosen = [test[i] for i in np.linspace(0, len(test) - 1, min(items, len(test))).astype(int)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (
        ("train.jsonl", train[:-held_out]),
        ("test.jsonl", train[-held_out:] + chosen),
    ):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if not (folder / name).is_file() or (folder / name).read_text() != text:
            (folder / name).write_text(text)


def recipe_of(task: str, row: Measured, seed: int, steps: int, arguments: Arguments) -> Recipe:
    """The recipe of a row; all rows of a task, seed and number of steps share their settings."""
    folder = arguments.runs / task
    sections = {
        "name": task,
        "seed": seed,
        "model": {"path": str(arguments.model.resolve())},
        "task": {
            "kind": "chat",
            "train": str((folder / "train.jsonl").resolve()),
            "test": str((folder / "test.jsonl").resolve()),
            "score": "json" if task == "nlupp" else "exact",
            "max_new_tokens": 128 if task == "nlupp" else 32,
            "sequence_length": 256,
        },
        "calibration": {"samples": 128, "sequence_length": 256},
        "sparsify": row.sparsify or UNPRUNED,
        "quantize": {"method": "gptq", "bits": 4, "group_size": 32, "embedding_bits": 8},
        "adapt": {
            "pipeline": "qa-sparsepeft",
            "ranks": [32],
            "elastic": False,
            "alpha": 64,
            "dropout": 0.05,
            "learning_rate": 3e-4,
            "schedule": "linear",
            "warmup_steps": max(1, steps // 20),
            "steps": steps,
            "batch": 16,
            "precision": "auto",
        },
        "export": {"targets": ["gguf"]},
        "benchmark": {"baselines": list(row.peers)},
    }
    return parse_recipe(json.dumps(sections), folder / "recipe.yaml", tuple(arguments.set))


def deployment(recipe: Recipe, row: Measured, model: Path, runs: Path) -> Path:
    """The folder of a row, made if it is missing."""
    if row.last is None:
        return model
    artifacts: dict[str, Artifact] = run_recipe(recipe, runs, (row.last,))
    return artifacts[row.last].path / row.folder


def measure(recipe: Recipe, row: Measured, folder: Path, base: Path) -> dict[str, Any]:
    """The points of every item, from 0 to 1, and the bytes of the model files."""
    tokenizer = load_tokenizer(base)
    items = Data(recipe, tokenizer).test
    stop = answer_stops(recipe, base, tokenizer)
    request = questions(recipe, items, stop, tokenizer, context_of(base))
    threads = recipe.benchmark.threads or len(os.sched_getaffinity(0))
    model = MeasuredModel(kind=row.runtime, folder=folder, threads=threads, device="cpu")
    scores = requested(measure_in_process(model, Requests(questions=request)).scores)
    judged = judge(recipe, items, scores, tokenizer)
    return {"points": [answer.points for answer in judged], "bytes": stored_bytes((folder,))}


def result_of(task: str, name: str, seed: int, steps: int, arguments: Arguments) -> dict[str, Any]:
    """The result of a row: read from its file, or measured and written."""
    row = ROWS[name]
    key = f"{name}-{seed}-{steps}" if row.last else name
    file = arguments.runs / task / "results" / f"{key}.json"
    if not file.is_file():
        recipe = recipe_of(task, row, seed, steps, arguments)
        folder = deployment(recipe, row, arguments.model, arguments.runs / task / "passes")
        found = measure(recipe, row, folder, arguments.model)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.rename(file)
        print(
            f"# {task}, {key}: {100 * np.mean(found['points'][arguments.validation :]):.1f} %",
            flush=True,
        )
    return json.loads(file.read_text())


@dataclass(frozen=True)
class Best:
    """The results of a row at its best number of steps.

    points: test items averaged over seeds, ``[items]``. by_seed: accuracy of every seed in percent.
    """

    steps: int
    points: np.ndarray
    by_seed: list[float]
    bytes: int


def best_of(results: dict[int, list[dict[str, Any]]], validation: int) -> Best:
    """The number of steps that is best on the validation items, and its test items.

    :param results: number of steps -> result of every seed.
    :param validation: number of validation items, which come first.
    """
    points = {steps: np.array([r["points"] for r in found]) for steps, found in results.items()}
    steps = max(points, key=lambda one: points[one][:, :validation].mean())
    test = points[steps][:, validation:]
    by_seed = [100 * float(seed.mean()) for seed in test]
    return Best(steps, test.mean(axis=0), by_seed, results[steps][0]["bytes"])


def paired(differences: list[np.ndarray]) -> dict[str, float]:
    """Mean difference in points, its 95 % bootstrap interval, and a p-value by sign flips.

    :param differences: per task, ``[items]``; every task counts equally.
    """
    random = np.random.default_rng(0)
    draws, flips = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for one in differences:
        for at in range(RESAMPLES):
            draws[at] += one[random.integers(0, len(one), len(one))].mean()
            flips[at] += (one * random.choice((-1, 1), len(one))).mean()
    count, total = len(differences), sum(float(one.mean()) for one in differences)
    low, high = np.percentile(draws / count, (2.5, 97.5))
    extreme = int((np.abs(flips) >= abs(total) - 1e-12).sum())
    return {
        "points": 100 * total / count,
        "low": 100 * float(low),
        "high": 100 * float(high),
        "p": (extreme + 1) / (RESAMPLES + 1),
    }


def measured_tasks(arguments: Arguments) -> dict[str, dict[str, Best]]:
    """Task -> row -> its best results; prints the learning curves."""
    found = dict[str, dict[str, Best]]()
    for task in arguments.tasks:
        write_task(task, arguments)
        results: dict[str, dict[int, list[dict[str, Any]]]] = {name: {} for name in ROWS}
        for seed in arguments.seeds:
            for steps in arguments.steps:
                for name in ROWS:
                    made = result_of(task, name, seed, steps, arguments)
                    results[name].setdefault(steps, []).append(made)
        on = f"{arguments.validation} validation items"
        print(f"\nLearning curve of {task}: accuracy in percent on {on}")
        table(["row", *map(str, arguments.steps)], list(_curves(results, arguments.validation)))
        found[task] = {name: best_of(one, arguments.validation) for name, one in results.items()}
    return found


def _curves(
    results: dict[str, dict[int, list[dict[str, Any]]]], validation: int
) -> Iterator[list[Any]]:
    for name, by_steps in results.items():
        shares = (np.mean([r["points"][:validation] for r in one]) for one in by_steps.values())
        yield [name, *(100 * float(share) for share in shares)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs="+", type=int, default=[300, 900, 1800])
    parser.add_argument("--items", type=int, default=1000, help="largest number of test items")
    parser.add_argument("--validation", type=int, default=200, help="items that choose the steps")
    parser.add_argument("--set", nargs="+", default=[], help="such as adapt.learning_rate=1e-3")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "worth")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tasks, arguments.seeds, arguments.steps = ["banking77"], [0], [60]
        arguments.items = min(arguments.items, 200)
    report(measured_tasks(arguments))


def report(found: dict[str, dict[str, Best]]) -> None:
    """Print the tables, and the line of JSON with every difference in points and its p-value."""
    print("\nEvery row at its best number of steps, on the test items")
    header = ["task", "row", "steps", "accuracy %", "lowest seed", "highest seed", "MB"]
    table(
        header,
        [
            [task, name, b.steps, np.mean(b.by_seed), min(b.by_seed), max(b.by_seed), b.bytes / 1e6]
            for task, rows in found.items()
            for name, b in rows.items()
        ],
    )
    compared = dict[str, dict[str, float]]()
    for name in ROWS:
        if name == REFERENCE:
            continue
        gaps = {task: rows[name].points - rows[REFERENCE].points for task, rows in found.items()}
        for task, gap in gaps.items():
            compared[f"{task}_{name}_minus_{REFERENCE}"] = paired([gap])
        compared[f"pooled_{name}_minus_{REFERENCE}"] = paired(list(gaps.values()))
    print(f"\nPoints above {REFERENCE}, with 95 % interval and p-value, paired by item")
    table(
        ["comparison", "points", "low", "high", "p"],
        [[name, *(v[k] for k in ("points", "low", "high", "p"))] for name, v in compared.items()],
    )
    points = {name: one["points"] for name, one in compared.items()}
    more = {f"{n}_{k}": one[k] for n, one in compared.items() for k in ("low", "high", "p")}
    finish("worth", {}, points | more)


if __name__ == "__main__":
    main()
