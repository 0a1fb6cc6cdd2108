"""report: one self-contained HTML page, a Markdown table and ``report.json``."""

import json
from pathlib import Path
from typing import Any

from sqft_export import pictures
from sqft_export.artifact import Artifact
from sqft_export.machine import describe
from sqft_export.pages import markdown, render
from sqft_export.recipe import Recipe
from sqft_export.stages import Context

CONSUMES = (
    "sparsify",
    "quantize",
    "adapt",
    "search",
    "merge",
    "export-openvino",
    "export-onnx",
    "verify",
    "teacher",
    "baselines",
    "benchmark",
)
READS = ()
VERSION = 7
SCHEMA = 2
MEASURES = {
    "problems": "exact match",
    "dataset": "answered right",
    "text": "tokens predicted right",
}

COLUMNS = (
    ("model", lambda r: r["name"]),
    ("accuracy", lambda r: _accuracy(r)),
    ("perplexity", lambda r: f"{r['perplexity']:.3f}"),
    ("sparsity", lambda r: f"{100 * r['sparsity']:.1f} %"),
    ("files", lambda r: f"{r['file_bytes'] / 1e6:.2f} MB"),
    ("TTFT ms", lambda r: _latency(r["ttft"])),
    ("TPOT ms", lambda r: _latency(r["tpot"])),
    ("peak memory", lambda r: f"{r['peak_memory_bytes'] / 2**20:.0f} MiB"),
)


def options(recipe: Recipe) -> dict:
    return {"recipe": recipe.model_dump(mode="json")}


def _accuracy(row: dict[str, Any]) -> str:
    share = f"{100 * row['accuracy']:.1f} %"
    if row["interval"] is None:
        return share
    low, high = row["interval"]
    return f"{share} ({100 * low:.1f} to {100 * high:.1f})"


def _latency(spread: dict[str, float]) -> str:
    return f"{spread['median_ms']:.2f} ({spread['p10_ms']:.2f} to {spread['p90_ms']:.2f})"


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table of numbers, a header row first."""
    return [[name for name, _ in COLUMNS], *([cell(row) for _, cell in COLUMNS] for row in rows)]


def _passes(inputs: dict[str, Artifact]) -> list[dict[str, Any]]:
    return [
        {"pass": name, "key": artifact.key[:16], "seconds": artifact.manifest["seconds"]}
        for name, artifact in inputs.items()
    ]


def _layers(inputs: dict[str, Artifact]) -> list[dict[str, Any]]:
    """Sparsity, bits and group size of every decoder Linear of the merged model."""
    sparsity = inputs["merge"].metrics["sparsity"]
    grids = inputs["quantize"].metrics if "quantize" in inputs else {"group_size": {}, "bits": {}}
    return [
        {
            "layer": name,
            "sparsity": share,
            "bits": grids["bits"].get(name),
            "group_size": grids["group_size"].get(name),
        }
        for name, share in sparsity.items()
        if name != "all"
    ]


def _training_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def document_of(context: Context) -> dict[str, Any]:
    """``report.json``: every number of the page, each from a sealed artifact."""
    inputs = context.inputs
    benchmark = json.loads((inputs["benchmark"].path / "results.json").read_text())
    task = context.recipe.task
    return {
        "schema": SCHEMA,
        "recipe": context.recipe.model_dump(mode="json"),
        "measure": MEASURES[task.kind],
        "rows": benchmark["rows"],
        "settings": benchmark["settings"],
        "verify": inputs["verify"].metrics["checks"],
        "passes": _passes(inputs),
        "layers": _layers(inputs),
        "search": inputs["search"].metrics,
        "adapt": inputs["adapt"].metrics,
        "warnings": [w for a in inputs.values() for w in a.metrics.get("warnings", [])],
        "machine": describe(),
        "versions": inputs["benchmark"].manifest["environment"]["versions"],
    }


def run(context: Context) -> dict:
    """Writes ``index.html``, its pictures as SVG files, ``report.md`` and ``report.json``."""
    document = document_of(context)
    rows, measure = document["rows"], document["measure"]
    table = cells(rows)
    (context.folder / "report.json").write_text(json.dumps(document, indent=2) + "\n")
    (context.folder / "report.md").write_text(markdown(table))
    log = _training_log(context.inputs["adapt"].path)
    drawn = [
        ("Accuracy along the passes", pictures.accuracy_along_passes(rows, measure)),
        ("Accuracy against file size", pictures.accuracy_against(rows, measure, "file_bytes")),
        ("Accuracy against latency", pictures.accuracy_against(rows, measure, "tpot")),
        ("Latency", pictures.latency(rows)),
        ("Sparsity by layer", pictures.sparsity_by_layer(document["layers"])),
        ("Training", pictures.training_curve(log)),
    ]
    if front := document["search"]["front"]:
        drawn.append(("Search", pictures.search_front(front, measure)))
    for title, svg in drawn:
        (context.folder / f"{title.lower().replace(' ', '-')}.svg").write_text(svg)
    page = render(
        "report.html",
        document=document,
        table=table,
        sets=[name for name in rows[0]["accuracy_by_set"] if name],
        recipe=context.recipe.file.read_text(),
        pictures=drawn,
    )
    (context.folder / "index.html").write_text(page)
    return {"rows": len(rows)}
