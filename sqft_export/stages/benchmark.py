"""benchmark: every row of the report, scored and timed on the same held-out items.

Each row runs in a process of its own (``measure/worker.py``), one after the other, with the same
number of threads. Deployments run as deployed: the runtimes' default precisions, not the exact
mode.
"""

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sqft_export.data.items import (
    ANSWER_FIELDS,
    TEST_FIELDS,
    TEST_FILES,
    Data,
    Item,
    first_of_every_set,
    load_tokenizer,
    stop_ids,
)
from sqft_export.data.scoring import Judged, judge, questions
from sqft_export.measure.agreement import Beside
from sqft_export.measure.chance import GUESSING_PERPLEXITY, chance_accuracy, is_at_chance
from sqft_export.measure.machine import machine_facts
from sqft_export.measure.rows import (
    DENSE,
    MADE,
    TITLES,
    Row,
    accuracy_row,
    answer_entry,
    latency_row,
    stored_bytes,
)
from sqft_export.measure.statistics import mcnemar
from sqft_export.measure.worker import in_a_process
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.packed.folders import PACKED, SPARSE
from sqft_export.recipe.schema import Benchmark, Recipe
from sqft_export.recipe.view import section_fields
from sqft_export.report.verdict import chance_text
from sqft_export.run.artifact import key_of
from sqft_export.run.device import device_of
from sqft_export.run.host import allowed_processors
from sqft_export.stages import BASE_FIELDS, Context
from sqft_export.targets.devices import DEVICE_KINDS, devices, why_not_run
from sqft_export.targets.folder import ADAPTER_FOLDER, context_of

CONSUMES: tuple[str, ...] = (
    "sparsify",
    "reconstruct",
    "quantize",
    "search",
    "merge",
    "export-openvino",
    "export-onnx",
    "export-gguf",
    "teacher",
    "baselines",
)
READS: tuple[str, ...] = ("model", "test", "device", "precision", "lm_eval_tasks")
SETTINGS = (
    *section_fields("benchmark", Benchmark, without=("lm_eval_folder",)),
    *("quantize.bits", "quantize.reconstruct", "unmerged"),  # which rows there are, their titles
)
FREE: tuple[str, ...] = ("device", "benchmark.lm_eval_folder", *TEST_FILES)
VERSION = 12
RESUMES = False
DISTRIBUTED = False


ANSWERS = ("answers", "likelihoods", "ttft_samples", "tpot_samples")
PILOT = 8  # items of every set that the others are reckoned from
# Rows whose distributions those after them are held to, and what that is called in a row.
REFERENCES = {DENSE: "beside_dense", "merged": "beside_merged"}


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    return (*SETTINGS, *BASE_FIELDS, *TEST_FIELDS, *ANSWER_FIELDS)


def rows(context: Context) -> list[Row]:
    """The rows of this recipe, in the order of the passes."""
    wanted = context.recipe.benchmark.baselines
    table = [*_baselines(context), *_tuned(context), *_deployments(context)]
    if "dense" in wanted:
        table.insert(0, Row(DENSE, "torch", context.model, (context.model,), 0.0))
    if device_of(context.recipe.device).type != "cpu":
        accelerated = ("torch", "adapted")
        table = [replace(r, device="gpu") if r.kind in accelerated else r for r in table]
    return on_devices(table, context.recipe.benchmark.targets)


def _baselines(context: Context) -> Iterator[Row]:
    """What other settings would have made of the base."""
    wanted, quantize = context.recipe.benchmark.baselines, context.recipe.quantize
    quantized = f"INT{quantize.bits}{', reconstructed' if quantize.reconstruct else ''}"
    for word, stage, name, folder in (
        ("dense-lora", "teacher", "dense + LoRA", "dense-lora"),
        ("sparse", "sparsify", "sparse", "model"),
        ("sparse", "reconstruct", "sparse, reconstructed", "model"),
        ("sparse-quantized", "baselines", f"sparse + {quantized}", "sparse-quantized"),
    ):
        if stage in context.inputs and word in wanted:
            made = context.inputs[stage]
            path = made.path / folder
            # Reconstruction keeps the zeros it is given.
            sparsity = context.inputs["sparsify" if stage == "reconstruct" else stage].metrics
            yield Row(name, "torch", path, (path,), sparsity["sparsity"]["all"])


def _tuned(context: Context) -> Iterator[Row]:
    """The model that is deployed, in torch: before merging, where it was tuned, and after."""
    inputs, recipe = context.inputs, context.recipe
    wanted, merged = recipe.benchmark.baselines, inputs["merge"].path / "model"
    sparsity = inputs["merge"].metrics["sparsity"]["all"]
    if "adapted" in wanted and "search" in inputs:
        base = context.base()
        grids = base.grids.glob("grids*.safetensors") if base.grids else []
        stored = (base.folder, inputs["search"].path / "adapter", *grids)
        yield Row("tuned, unmerged", "adapted", base.folder, stored, sparsity)
    if "merged" in wanted and not recipe.unmerged:
        yield Row("merged", "torch", merged, (merged,), sparsity)


def _deployments(context: Context) -> Iterator[Row]:
    recipe, sparsity = context.recipe, context.inputs["merge"].metrics["sparsity"]["all"]
    for target, title in TITLES.items():
        if f"export-{target}" not in context.inputs or why_not_run(target, recipe.unmerged):
            continue
        folder = context.inputs[f"export-{target}"].path / "model"
        yield Row(title, target, folder, (folder, folder / ADAPTER_FOLDER), sparsity)
        packed = folder.with_name(PACKED)
        if packed.is_dir():
            stored = (packed, packed / ADAPTER_FOLDER)
            yield Row(f"{title}, packed", target, packed, stored, sparsity)
        sparse = folder.with_name(SPARSE)
        if sparse.is_dir():
            stored = (sparse, sparse / ADAPTER_FOLDER)
            yield Row(f"{title}, sparse execution", target, sparse, stored, sparsity)


def on_devices(table: list[Row], targets: tuple[str, ...]) -> list[Row]:
    """What was made, on every device that is asked for and here; all else on the CPU alone."""
    others = [d for d in DEVICE_KINDS[1:] if {d, "auto"} & set(targets)]
    here = {(d.runtime, d.kind) for d in devices() if d.missing is None} if others else set()
    made = [row for row in table if row.name in MADE]
    moved = [
        replace(row, name=f"{row.name}, {kind.upper()}", device=kind)
        for kind in others
        for row in made
        if (row.kind, kind) in here and row.device != kind
    ]
    if {"cpu", "auto"} & set(targets):
        return table + moved
    return [row for row in table if row not in made] + moved


def _job(context: Context, row: Row) -> dict[str, Any]:
    benchmark = context.recipe.benchmark
    base, searched = context.base(), context.path("search")
    return {
        "kind": row.kind,
        "device": row.device,
        "folder": str(row.folder),
        "masks": str(base.masks) if base.masks else None,
        "grids": str(base.grids) if base.grids else None,
        "unmerged": base.unmerged,
        "adapter": str(searched / "adapter") if searched else None,
        "threads": threads(context.recipe),
        "new_tokens": benchmark.new_tokens,
        "repeats": benchmark.repeats,
        "precision": context.reads.get("precision"),
    }


def threads(recipe: Recipe) -> int:
    return recipe.benchmark.threads or allowed_processors()


def run(context: Context) -> dict:
    """Writes ``results.json``, and ``items.jsonl`` with every answer of every row."""
    recipe = context.recipe
    tokenizer = load_tokenizer(context.model)
    table = rows(context)
    items, runs = _measured(context, table, Data(recipe, tokenizer).test, tokenizer)
    judged = {row.name: judge(recipe, items, runs[row.name][0], tokenizer) for row in table}
    with (context.folder / "items.jsonl").open("w") as log:
        for name, answers in judged.items():
            for number, answer in enumerate(answers):
                entry = {"row": name, "item": number} | answer_entry(answer)
                log.write(json.dumps(entry) + "\n")
    weights = Checkpoint(context.model).parameters
    results = [_described(row, weights) | _found(row.name, judged, runs[row.name]) for row in table]
    _add_shares_of_dense(results, chance_accuracy(items))
    document = {
        "settings": _settings(recipe, items),
        "machine": machine_facts(),
        "rows": results,
    }
    (context.folder / "results.json").write_text(json.dumps(document, indent=2) + "\n")
    return {"rows": len(results), "warnings": _warnings(results, recipe.adapt is not None)}


def _add_shares_of_dense(results: list[dict[str, Any]], chance: float | None) -> None:
    """Accuracy as a share of the dense base's, unless that one knows nothing about the task."""
    dense = results[0]
    if dense["name"] != DENSE:
        return
    dense["chance"] = chance
    dense["at_chance"] = is_at_chance(dense)
    if dense["at_chance"] or not dense["accuracy"]:
        return
    for result in results:
        result["recovery"] = result["accuracy"] / dense["accuracy"]


def _found(
    name: str, judged: dict[str, list[Judged]], runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Figures of a row; its answers beside those of the first row and of dense + LoRA."""
    first, lora = (
        [answer.right for answer in judged.get(other, [])]
        for other in (next(iter(judged)), "dense + LoRA")
    )
    right = [answer.right for answer in judged[name]]
    kept = {k: v for k, v in runs[0].items() if k not in ANSWERS}
    found = accuracy_row(judged[name], runs[0], first) | latency_row(runs) | kept
    return found | {"p_same_as_lora": mcnemar(right, lora) if right and lora else None}


def _asked_of_lm_eval(recipe: Recipe) -> dict[str, Any]:
    asked = recipe.benchmark
    if not asked.lm_eval:
        return {}
    folder = str(recipe.lm_eval_folder) if recipe.lm_eval_folder else None
    return {"lm_eval": {"tasks": list(asked.lm_eval), "folder": folder, "items": asked.items}}


def _measured(
    context: Context, table: list[Row], items: list[Item], tokenizer: Any
) -> tuple[list[Item], dict[str, list[dict[str, Any]]]]:
    """The items that were scored, and what every process of every row measured; the first has the
    answers too.

    Rows take turns, and each round turns the order round, so that a slow moment of the machine
    hits all of them.
    """
    recipe, started = context.recipe, time.monotonic()
    rounds, minutes = recipe.benchmark.rounds, recipe.benchmark.minutes
    first = first_of_every_set(items, PILOT if minutes else recipe.benchmark.items)
    ids = [token for item in first for token in item.ids]
    prompt = ids[: recipe.benchmark.prompt_tokens]
    advance = context.start((rounds + bool(minutes)) * len(table))
    found: dict[str, list[dict[str, Any]]] = {row.name: [] for row in table}

    def ask(row: Row, job: dict[str, Any]) -> dict[str, Any]:
        result = in_a_process(_job(context, row) | job, context.folder)
        advance(row.name)
        return result

    timed = {"latency_prompt": prompt}
    # lm-eval's tasks are not what minutes are shared out for: they come on top, at the end.
    by_lm_eval = _asked_of_lm_eval(recipe)
    once = {"questions": _questions(context, tokenizer, first)} | ({} if minutes else by_lm_eval)
    beside = Beside(context.folder, items) if REFERENCES.keys() & found.keys() else None
    for row in table:
        found[row.name].append(ask(row, timed | once | (beside.asked() if beside else {})))
        if beside:
            found[row.name][0] |= beside.found(REFERENCES.get(row.name))
    for number in range(1, rounds):
        for row in table if number % 2 == 0 else table[::-1]:
            found[row.name].append(ask(row, timed))
    if minutes:
        first = _that_fit(items, found, 60 * minutes - (time.monotonic() - started))
        asked = {"questions": _questions(context, tokenizer, first)} | by_lm_eval
        for row in table:
            found[row.name][0] |= ask(row, asked)
    return first, found


def _questions(context: Context, tokenizer: Any, items: list[Item]) -> dict[str, Any]:
    stop, most = stop_ids(context.model, tokenizer), context_of(context.model)
    return questions(context.recipe, items, stop, tokenizer, most)


def _that_fit(
    items: list[Item], found: dict[str, list[dict[str, Any]]], seconds: float
) -> list[Item]:
    """As many items of every set as all rows score in a time, by what the fewest took."""
    of_fewest = sum(runs[0]["score_seconds"] for runs in found.values())
    return first_of_every_set(items, max(PILOT, int(PILOT * seconds / of_fewest)))


def _warnings(results: list[dict[str, Any]], was_tuned: bool) -> list[str]:
    """Where tuning left the model worse than it found it, or the base itself is at a loss."""
    found = []
    before = [row for row in results if row["name"].startswith("sparse")][-1:]
    tuned = [row for row in results if row["name"] in ("tuned, unmerged", "merged") and was_tuned]
    for start, row in itertools.product(before, tuned):
        for figure in ("perplexity", "accuracy"):
            if _is_worse(row, start, figure):
                found.append(
                    f"tuning made it worse: {figure} of {row['name']!r} is {row[figure]:.4g}, of "
                    f"{start['name']!r} before tuning {start[figure]:.4g}; look at "
                    "adapt.learning_rate"
                )
    found += dict.fromkeys(w for row in results for w in row.get("lm_eval_warnings", []))
    for row in results:
        if row["name"] != DENSE:
            continue
        if row["perplexity"] > GUESSING_PERPLEXITY:
            found.append(
                f"the dense base has a perplexity of {row['perplexity']:.0f} on the answers: it "
                "does not know this task or this text; look at the tokenizer and the prompts"
            )
        elif row.get("at_chance"):
            found.append(f"{chance_text(row)}; look at the tokenizer and the prompts")
    return found


def _is_worse(row: dict[str, Any], start: dict[str, Any], figure: str) -> bool:
    """Beyond chance, for an accuracy: below the interval of the one before."""
    if figure == "perplexity":
        return not row[figure] <= 1.02 * start[figure]  # none at all is worse too
    interval = start["interval"]
    return row[figure] < (interval[0] if interval else start[figure])


def _described(row: Row, weights: int) -> dict[str, Any]:
    """:param weights: of the base."""
    stored = stored_bytes(row.stored)
    return {
        "name": row.name,
        "runtime": "torch" if row.kind == "adapted" else row.kind,
        "device": row.device,
        "sparsity": row.sparsity,
        "file_bytes": stored,
        "bits_per_weight": 8 * stored / weights,
    }


def _settings(recipe: Recipe, items: list[Item]) -> dict[str, Any]:
    scored = [[item.prompt, item.target, item.text] for item in items]
    return {
        "items": len(items),
        "items_sha256": key_of({"items": scored}),
        "threads": threads(recipe),
        "rounds": recipe.benchmark.rounds,
        "latency_prompt_tokens": recipe.benchmark.prompt_tokens,
        "latency_new_tokens": recipe.benchmark.new_tokens,
        "latency_repeats": recipe.benchmark.repeats,
    }
