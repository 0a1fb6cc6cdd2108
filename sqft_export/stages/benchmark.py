"""benchmark: every row of the report, scored and timed on the same held-out items.

Each row runs in a process of its own (``worker.py``), one after the other, with the same number
of threads. Deployments run as deployed: the runtimes' default precisions, not the exact mode.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqft_export import tasks
from sqft_export.intervals import mcnemar, wilson
from sqft_export.recipe import Recipe
from sqft_export.sparse.folders import PACKED
from sqft_export.stages import Context
from sqft_export.targets import ADAPTER
from sqft_export.targets.devices import DEVICES, places
from sqft_export.worker import in_a_process

CONSUMES = (
    "sparsify",
    "quantize",
    "search",
    "merge",
    "export-openvino",
    "export-onnx",
    "teacher",
    "baselines",
)
READS = ("model", "test")
VERSION = 3
MADE = ("merged", "OpenVINO", "ONNX Runtime")  # rows of a model that is to live on the target
WEIGHTS = ("*.safetensors", "*.bin", "*.xml", "*.onnx", "*.data", "*.onnx_adapter", "*.sqft")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    kind: torch, adapted, openvino or onnx: how the worker opens it.
    stored: files and folders whose model files count as its size.
    sparsity: share of zero weights in the decoder Linears.
    device: cpu, gpu or npu.
    """

    name: str
    kind: str
    folder: Path
    stored: tuple[Path, ...]
    sparsity: float
    device: str = "cpu"


def options(recipe: Recipe) -> dict:
    return {"benchmark": recipe.benchmark.model_dump()}


def rows(context: Context) -> list[Row]:
    """The rows of this recipe, in the order of the passes."""
    inputs, wanted = context.inputs, context.recipe.benchmark.baselines
    merged = inputs["merge"].path / "model"
    merged_sparsity = inputs["merge"].metrics["sparsity"]["all"]
    table = [Row("dense base", "torch", context.model, (context.model,), 0.0)]
    if "teacher" in inputs and "dense-lora" in wanted:
        folder = inputs["teacher"].path / "dense-lora"
        sparsity = inputs["teacher"].metrics["sparsity"]["all"]
        table.append(Row("dense + LoRA", "torch", folder, (folder,), sparsity))
    if "sparsify" in inputs and "sparse" in wanted:
        folder = inputs["sparsify"].path / "model"
        sparsity = inputs["sparsify"].metrics["sparsity"]["all"]
        table.append(Row("sparse", "torch", folder, (folder,), sparsity))
    if "baselines" in inputs:
        folder = inputs["baselines"].path / "sparse-quantized"
        name = f"sparse + INT{context.recipe.quantize.bits}"
        sparsity = inputs["baselines"].metrics["sparsity"]["all"]
        table.append(Row(name, "torch", folder, (folder,), sparsity))
    if "adapted" in wanted:
        base = context.base()
        stored = (
            base.folder,
            inputs["search"].path / "adapter",
            *(base.grids.glob("grids*.safetensors") if base.grids else []),
        )
        table.append(Row("tuned, adapter apart", "adapted", base.folder, stored, merged_sparsity))
    if "merged" in wanted and not context.recipe.adapt.apart:
        table.append(Row("merged", "torch", merged, (merged,), merged_sparsity))
    for target, title in (("openvino", "OpenVINO"), ("onnx", "ONNX Runtime")):
        if f"export-{target}" in inputs:
            folder = inputs[f"export-{target}"].path / "model"
            table.append(Row(title, target, folder, (folder, folder / ADAPTER), merged_sparsity))
            packed = folder.with_name(PACKED)
            if packed.is_dir():
                stored = (packed, packed / ADAPTER)
                table.append(Row(f"{title}, packed", target, packed, stored, merged_sparsity))
    if "dense" not in wanted:
        table = table[1:]
    return on_devices(table, context.recipe.benchmark.targets)


def on_devices(table: list[Row], targets: tuple[str, ...]) -> list[Row]:
    """What was made, on every device that is asked for and here; all else on the CPU alone."""
    others = [d for d in DEVICES[1:] if {d, "auto"} & set(targets)]
    here = {(p.runtime, p.device) for p in places() if p.missing is None} if others else set()
    made = [row for row in table if row.name in MADE]
    moved = [
        replace(row, name=f"{row.name}, {device.upper()}", device=device)
        for device in others
        for row in made
        if (row.kind, device) in here
    ]
    if {"cpu", "auto"} & set(targets):
        return table + moved
    return [row for row in table if row not in made] + moved


def stored_bytes(paths: tuple[Path, ...]) -> int:
    """Bytes of the model files: weights and graphs, without tokenizers and configs."""
    files = {
        file
        for path in paths
        for file in ([path] if path.is_file() else [f for p in WEIGHTS for f in path.glob(p)])
        if "tokenizer" not in file.name
    }
    return sum(file.stat().st_size for file in files)


def _job(context: Context, row: Row, items: list[tasks.Item], tokenizer: Any) -> dict[str, Any]:
    benchmark = context.recipe.benchmark
    ids = [token for item in items for token in item.prompt + item.target]
    base = context.base()
    return {
        "kind": row.kind,
        "device": row.device,
        "folder": str(row.folder),
        "masks": str(base.masks) if base.masks else None,
        "grids": str(base.grids) if base.grids else None,
        "apart": base.apart,
        "adapter": str(context.inputs["search"].path / "adapter"),
        "threads": threads(context.recipe),
        "questions": tasks.questions(context.recipe, items, tokenizer),
        "latency_prompt": ids[: benchmark.prompt_tokens],
        "new_tokens": benchmark.new_tokens,
        "repeats": benchmark.repeats,
    }


def threads(recipe: Recipe) -> int:
    return recipe.benchmark.threads or os.cpu_count() or 1


def _told(judged: tasks.Judged) -> dict[str, Any]:
    told = {"answer": judged.said, "expected": judged.item.text, "right": judged.right}
    return told | ({"set": judged.item.source} if judged.item.source else {})


def run(context: Context) -> dict:
    """Writes ``results.json``, and ``items.jsonl`` with every answer of every row."""
    recipe = context.recipe
    tokenizer = tasks.load_tokenizer(context.model)
    items = tasks.test_items(recipe, tasks.load(recipe, tokenizer))
    table = rows(context)
    advance = context.start(len(table))
    results: list[dict[str, Any]] = []
    first: list[bool] = []
    with (context.folder / "items.jsonl").open("w") as log:
        for row in table:
            result = in_a_process(_job(context, row, items, tokenizer))
            judged = tasks.judge(recipe, items, result, tokenizer)
            for number, answer in enumerate(judged):
                log.write(json.dumps({"row": row.name, "item": number} | _told(answer)) + "\n")
            right = [answer.right for answer in judged]
            first = first or right
            measured = {
                "name": row.name,
                "runtime": "torch" if row.kind == "adapted" else row.kind,
                "device": row.device,
                "accuracy": tasks.accuracy_of(judged, result),
                "interval": wilson(sum(right), len(right)) if right else None,
                "p_same_as_first": mcnemar(right, first) if right else None,
                "accuracy_by_set": tasks.accuracy_by_set(judged),
                "sparsity": row.sparsity,
                "file_bytes": stored_bytes(row.stored),
            }
            kept = {k: v for k, v in result.items() if k not in ("answers", "likelihoods")}
            results.append(measured | kept)
            advance()
    settings = {
        "items": len(items),
        "threads": threads(recipe),
        "latency_prompt_tokens": recipe.benchmark.prompt_tokens,
        "latency_new_tokens": recipe.benchmark.new_tokens,
        "latency_repeats": recipe.benchmark.repeats,
    }
    document = {"settings": settings, "rows": results}
    (context.folder / "results.json").write_text(json.dumps(document, indent=2) + "\n")
    return {"rows": len(results)}
