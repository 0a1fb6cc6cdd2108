"""benchmark: score and time every row of the report on the same held-out items.

Each row runs in a separate process (``measure/worker.py``), one after the other, with the same
number of threads. Deployments run in the default precision of their runtime, not in the exact
mode.
"""

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sqft_export.data.items import (
    SCORE_FIELDS,
    SCORE_FILES,
    TASK_FILES,
    TEST_FIELDS,
    Data,
    Item,
    first_of_every_set,
    load_tokenizer,
    stop_ids,
)
from sqft_export.data.scoring import Judged, judge, questions
from sqft_export.measure.agreement import ReferenceModels
from sqft_export.measure.chance import GUESSING_PERPLEXITY, chance_accuracy, is_at_chance
from sqft_export.measure.machine import machine_facts
from sqft_export.measure.rows import (
    DENSE,
    FINAL_ROWS,
    TITLES,
    Row,
    accuracy_row,
    answer_entry,
    latency_row,
    stored_bytes,
)
from sqft_export.measure.statistics import mcnemar
from sqft_export.measure.worker import measure_in_process
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
READS: tuple[str, ...] = ("model", "test", "device", "precision", "lm_eval_tasks", "score")
SETTINGS = (
    *section_fields("benchmark", Benchmark, without=("lm_eval_folder",)),
    *("quantize.bits", "quantize.reconstruct", "unmerged"),  # decide the rows and their titles
)
FREE: tuple[str, ...] = ("device", "benchmark.lm_eval_folder", *TASK_FILES, *SCORE_FILES)
VERSION = 12
RESUMES = False
DISTRIBUTED = False


# Keys of a result that ``results.json`` leaves out: one value per item or per repeat.
RAW_RESULTS = ("answers", "likelihoods", "ttft_samples", "tpot_samples")
PILOT_ITEMS = 8  # items per set that are timed to estimate how many items fit into the minutes
# Rows whose distributions all later rows are compared with -> the key of the comparison.
REFERENCES = {DENSE: "beside_dense", "merged": "beside_merged"}


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return the fields of the benchmark, the base, and the test items."""
    return (*SETTINGS, *BASE_FIELDS, *TEST_FIELDS, *SCORE_FIELDS)


def rows(context: Context) -> list[Row]:
    """Return the rows of this recipe in the order of the passes."""
    wanted = context.recipe.benchmark.baselines
    table = [*_baselines(context), *_tuned(context), *_deployments(context)]
    if "dense" in wanted:
        table.insert(0, Row(DENSE, "torch", context.model, (context.model,), 0.0))
    if device_of(context.recipe.device).type != "cpu":
        accelerated = ("torch", "adapted")
        table = [replace(r, device="gpu") if r.kind in accelerated else r for r in table]
    return on_devices(table, context.recipe.benchmark.targets)


def _baselines(context: Context) -> Iterator[Row]:
    """Yield the rows of models without the recipe's full pipeline."""
    wanted, quantize = context.recipe.benchmark.baselines, context.recipe.quantize
    quantized = f"INT{quantize.bits}{', reconstructed' if quantize.reconstruct else ''}"
    for word, stage, name, folder in (
        ("dense-lora", "teacher", "dense + LoRA", "dense-lora"),
        ("sparse", "sparsify", "sparse", "model"),
        ("sparse", "reconstruct", "sparse, reconstructed", "model"),
        ("sparse-quantized", "baselines", f"sparse + {quantized}", "sparse-quantized"),
    ):
        if stage in context.inputs and word in wanted:
            path = context.inputs[stage].path / folder
            # Reconstruction keeps all zeros, so its sparsity is that of sparsify.
            sparsity = context.inputs["sparsify" if stage == "reconstruct" else stage].metrics
            yield Row(name, "torch", path, (path,), sparsity["sparsity"]["all"])


def _tuned(context: Context) -> Iterator[Row]:
    """Yield the torch rows of the deployed model: unmerged if it was tuned, and merged."""
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
    """Yield the rows of every deployment and its packed and sparse copies."""
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
    """Return the rows with one row per requested device for the merged model and deployments.

    Devices that this machine lacks are left out. All other rows keep the device that they have.

    :param targets: devices of the recipe: ``cpu``, ``auto``, or a kind of accelerator.
    """
    others = [d for d in DEVICE_KINDS[1:] if {d, "auto"} & set(targets)]
    available = {(d.runtime, d.kind) for d in devices() if d.missing is None} if others else set()
    made = [row for row in table if row.name in FINAL_ROWS]
    on_others = [
        replace(row, name=f"{row.name}, {kind.upper()}", device=kind)
        for kind in others
        for row in made
        if (row.kind, kind) in available and row.device != kind
    ]
    if {"cpu", "auto"} & set(targets):
        return table + on_others
    return [row for row in table if row not in made] + on_others


def _job(context: Context, row: Row) -> dict[str, Any]:
    """Return the part of the worker's job that is the same for all rounds of a row."""
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
    """Return the number of threads of every row: the recipe's, or all allowed processors."""
    return recipe.benchmark.threads or allowed_processors()


def run(context: Context) -> dict:
    """Write ``results.json``, and ``items.jsonl`` with every answer of every row."""
    recipe = context.recipe
    tokenizer = load_tokenizer(context.model)
    table = rows(context)
    items, runs = _measure_rows(context, table, Data(recipe, tokenizer).test, tokenizer)
    judged = {row.name: judge(recipe, items, runs[row.name][0], tokenizer) for row in table}
    with (context.folder / "items.jsonl").open("w") as log:
        for name, answers in judged.items():
            for number, answer in enumerate(answers):
                entry = {"row": name, "item": number} | answer_entry(answer)
                log.write(json.dumps(entry) + "\n")
    weights = Checkpoint(context.model).parameters
    results = [
        _describe(row, weights) | _figures(row.name, judged, runs[row.name]) for row in table
    ]
    _add_shares_of_dense(results, chance_accuracy(items))
    document = {
        "settings": _settings(recipe, items),
        "machine": machine_facts(),
        "rows": results,
    }
    (context.folder / "results.json").write_text(json.dumps(document, indent=2) + "\n")
    return {"rows": len(results), "warnings": _warnings(results, recipe.adapt is not None)}


def _add_shares_of_dense(results: list[dict[str, Any]], chance: float | None) -> None:
    """Add ``recovery``, the accuracy divided by that of the dense base, to every row.

    Adds nothing without a dense row, or if the dense base is at chance level.

    :param chance: accuracy of guessing, or None if it is unknown.
    """
    dense = results[0]
    if dense["name"] != DENSE:
        return
    dense["chance"] = chance
    dense["at_chance"] = is_at_chance(dense)
    if dense["at_chance"] or not dense["accuracy"]:
        return
    for result in results:
        result["recovery"] = result["accuracy"] / dense["accuracy"]


def _figures(
    name: str, judged: dict[str, list[Judged]], runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the figures of a row.

    Its answers are compared with those of the first row and with those of dense + LoRA.
    """
    first, lora = (
        [answer.right for answer in judged.get(other, [])]
        for other in (next(iter(judged)), "dense + LoRA")
    )
    right = [answer.right for answer in judged[name]]
    kept = {k: v for k, v in runs[0].items() if k not in RAW_RESULTS}
    figures = accuracy_row(judged[name], runs[0], first) | latency_row(runs) | kept
    return figures | {"p_same_as_lora": mcnemar(right, lora) if right and lora else None}


def _lm_eval_job(recipe: Recipe) -> dict[str, Any]:
    """Return the part of a worker's job that requests lm-eval's tasks; empty without tasks."""
    benchmark = recipe.benchmark
    if not benchmark.lm_eval:
        return {}
    folder = str(recipe.lm_eval_folder) if recipe.lm_eval_folder else None
    return {
        "lm_eval": {"tasks": list(benchmark.lm_eval), "folder": folder, "items": benchmark.items}
    }


def _measure_rows(
    context: Context, table: list[Row], items: list[Item], tokenizer: Any
) -> tuple[list[Item], dict[str, list[dict[str, Any]]]]:
    """Run every row in every round; return the scored items, and row name -> results per process.

    Rows are interleaved, and every second round reverses their order. A slow moment of the machine
    then affects all rows alike. The first process of a row also scores the items.
    """
    recipe, started = context.recipe, time.monotonic()
    rounds, minutes = recipe.benchmark.rounds, recipe.benchmark.minutes
    scored = first_of_every_set(items, PILOT_ITEMS if minutes else recipe.benchmark.items)
    ids = [token for item in scored for token in item.ids]
    prompt = ids[: recipe.benchmark.prompt_tokens]
    advance = context.start((rounds + bool(minutes)) * len(table))
    found: dict[str, list[dict[str, Any]]] = {row.name: [] for row in table}

    def run_row(row: Row, job: dict[str, Any]) -> dict[str, Any]:
        result = measure_in_process(_job(context, row) | job, context.folder)
        advance(row.name)
        return result

    timed = {"latency_prompt": prompt}
    # The limit of minutes does not include lm-eval's tasks. They run last.
    lm_eval = _lm_eval_job(recipe)
    once = {"questions": _questions(context, tokenizer, scored)} | ({} if minutes else lm_eval)
    beside = ReferenceModels(context.folder, items) if REFERENCES.keys() & found.keys() else None
    for row in table:
        found[row.name].append(run_row(row, timed | once | (beside.job_part() if beside else {})))
        if beside:
            found[row.name][0] |= beside.compare(REFERENCES.get(row.name))
    for number in range(1, rounds):
        for row in table if number % 2 == 0 else table[::-1]:
            found[row.name].append(run_row(row, timed))
    if minutes:
        scored = _items_within(items, found, 60 * minutes - (time.monotonic() - started))
        final = {"questions": _questions(context, tokenizer, scored)} | lm_eval
        for row in table:
            found[row.name][0] |= run_row(row, final)
    return scored, found


def _questions(context: Context, tokenizer: Any, items: list[Item]) -> dict[str, Any]:
    """Return the part of a worker's job that scores the items."""
    stop, max_tokens = stop_ids(context.model, tokenizer), context_of(context.model)
    return questions(context.recipe, items, stop, tokenizer, max_tokens)


def _items_within(
    items: list[Item], found: dict[str, list[dict[str, Any]]], seconds: float
) -> list[Item]:
    """Return the items of every set that all rows together can score within a time.

    The estimate is linear in the time that the pilot items took.
    """
    pilot_seconds = sum(runs[0]["score_seconds"] for runs in found.values())
    return first_of_every_set(items, max(PILOT_ITEMS, int(PILOT_ITEMS * seconds / pilot_seconds)))


def _warnings(results: list[dict[str, Any]], was_tuned: bool) -> list[str]:
    """Return a warning if tuning made the model worse, and if the base does not know the task."""
    found = []
    before = [row for row in results if row["name"].startswith("sparse")][-1:]
    tuned = [row for row in results if row["name"] in ("tuned, unmerged", "merged") and was_tuned]
    for start, row in itertools.product(before, tuned):
        for figure in ("perplexity", "accuracy"):
            if _is_worse(row, start, figure):
                found.append(
                    f"tuning made the model worse: {figure} of {row['name']!r} is "
                    f"{row[figure]:.4g}, that of {start['name']!r} before tuning is "
                    f"{start[figure]:.4g}; try a lower adapt.learning_rate"
                )
    found += dict.fromkeys(w for row in results for w in row.get("lm_eval_warnings", []))
    for row in results:
        if row["name"] != DENSE:
            continue
        if row["perplexity"] > GUESSING_PERPLEXITY:
            found.append(
                f"the dense base has a perplexity of {row['perplexity']:.0f} on the answers: it "
                "does not know this task or text; check the tokenizer and the prompts"
            )
        elif row.get("at_chance"):
            found.append(f"{chance_text(row)}; check the tokenizer and the prompts")
    return found


def _is_worse(row: dict[str, Any], start: dict[str, Any], figure: str) -> bool:
    """Return True if a row is worse than ``start``, by more than noise.

    A perplexity is worse if it is more than 2 % higher. An accuracy is worse if it is below the
    confidence interval of ``start``.
    """
    if figure == "perplexity":
        return not row[figure] <= 1.02 * start[figure]  # NaN counts as worse
    interval = start["interval"]
    return row[figure] < (interval[0] if interval else start[figure])


def _describe(row: Row, weights: int) -> dict[str, Any]:
    """Return name, runtime, device and size of a row.

    :param weights: number of weights of the base model.
    """
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
    """Return the settings that the report prints, with a digest of the scored items."""
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
