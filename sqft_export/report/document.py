"""Build ``report.json`` and the cells of its tables."""

import json
from collections.abc import Callable
from typing import Any

from sqft_export.measure.quality import quality_file, read_quality
from sqft_export.recipe.schema import Recipe
from sqft_export.report.text import accuracy_text
from sqft_export.report.verdict import verdict
from sqft_export.run.artifact import Artifact

SCHEMA = 4
MEASURES = {
    "problems": "exact match",
    "dataset": "answered right",
    "text": "tokens predicted right",
    "chat": "score of the answer",
}
# The columns of the first table, then those of the detailed one.
MAIN = (
    ("model", lambda r: r["name"]),
    ("accuracy", accuracy_text),
    ("tokens/s", lambda r: f"{1000 / r['tpot']['median_ms']:.0f}"),
    ("TTFT ms", lambda r: f"{r['ttft']['median_ms']:.2f}"),
    ("size MB", lambda r: f"{r['file_bytes'] / 1e6:.2f}"),
    ("peak MiB", lambda r: f"{r['peak_memory_bytes'] / 2**20:.0f}"),
)
DETAILS = (
    ("perplexity", lambda r: f"{r['perplexity']:.3f}"),
    ("recovery", lambda r: f"{100 * r['recovery']:.1f} %" if "recovery" in r else None),
    ("top-1 agreement", lambda r: _agreement(r)),
    ("KL nats/token", lambda r: _divergence(r, "beside_dense")),
    ("KL to merged nats/token", lambda r: _divergence(r, "beside_merged")),
    ("sparsity", lambda r: f"{100 * r['sparsity']:.1f} %"),
    ("bits/weight", lambda r: f"{r['bits_per_weight']:.2f}"),
    ("TTFT ms (p10 to p90)", lambda r: _latency(r["ttft"])),
    ("TPOT ms (p10 to p90)", lambda r: _latency(r["tpot"])),
)
Columns = tuple[tuple[str, Callable[[dict[str, Any]], str | None]], ...]


def _latency(spread: dict[str, float]) -> str:
    return f"{spread['median_ms']:.2f} ({spread['p10_ms']:.2f} to {spread['p90_ms']:.2f})"


def _agreement(row: dict[str, Any]) -> str | None:
    return f"{100 * row['beside_dense']['agreement']:.1f} %" if "beside_dense" in row else None


def _divergence(row: dict[str, Any], field: str) -> str | None:
    return f"{row[field]['kl_nats']:.2g}" if field in row else None


def cells(rows: list[dict[str, Any]], columns: Columns = (*MAIN, *DETAILS)) -> list[list[str]]:
    """Return the table as text cells, header first, without columns that no row has."""
    columns_of_cells = [(name, [cell(row) for row in rows]) for name, cell in columns]
    kept = [[name, *found] for name, found in columns_of_cells if any(c is not None for c in found)]
    return [[cell or "" for cell in line] for line in zip(*kept, strict=True)]


def lm_eval_cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return lm-eval's metrics of every row, header first; empty if none were requested."""
    tasks: dict[str, dict[str, float]] = rows[0].get("lm_eval", {})
    chosen = [
        (task, figure)
        for task, found in tasks.items()
        for figure in found
        if "," in figure
        and "stderr" not in figure  # skip entries that are no metrics, such as `sample_len`
    ]
    if not chosen:
        return []
    header = [f"{task}, {figure.removesuffix(',none')}" for task, figure in chosen]
    return [
        ["model", *header],
        *([r["name"], *(f"{r['lm_eval'][t][f]:.4g}" for t, f in chosen)] for r in rows),
    ]


def _passes(inputs: dict[str, Artifact]) -> list[dict[str, Any]]:
    return [
        {
            "pass": name,
            "key": artifact.key[:16],
            "seconds": artifact.manifest["seconds"],
            "quality": read_quality(quality_file(artifact.path.parent, name, artifact.key)),
        }
        for name, artifact in inputs.items()
    ]


def _layers(inputs: dict[str, Artifact]) -> list[dict[str, Any]]:
    """Return sparsity, bits and group size of every decoder Linear of the merged model."""
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


def _sparse_execution(
    inputs: dict[str, Artifact], rows: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the kernels of the sparse-execution folder, and its measured gains in this run."""
    export = inputs.get("export-openvino")
    sparse = export.metrics.get("sparse") if export else None
    by_name = {row["name"]: row for row in rows}
    ours, theirs = (by_name.get(f"OpenVINO{end}") for end in (", sparse execution", ""))
    if not sparse or not ours or not theirs:
        return sparse
    gains = {
        "tpot_times_as_fast": theirs["tpot"]["median_ms"] / ours["tpot"]["median_ms"],
        "bytes_ratio": ours["file_bytes"] / theirs["file_bytes"],
        "memory_ratio": ours["steady_memory_bytes"] / theirs["steady_memory_bytes"],
    }
    return sparse | gains


def report_of_run(recipe: Recipe, inputs: dict[str, Artifact]) -> dict[str, Any]:
    """Return the document of ``report.json``. Every number comes from a sealed artifact."""
    benchmark = json.loads((inputs["benchmark"].path / "results.json").read_text())
    return {
        "schema": SCHEMA,
        "recipe": recipe.model_dump(mode="json"),
        "measure": MEASURES[recipe.task.kind],
        "verdict": verdict(benchmark["rows"], MEASURES[recipe.task.kind]),
        "rows": benchmark["rows"],
        "settings": benchmark["settings"],
        "verify": inputs["verify"].metrics["checks"],
        "passes": _passes(inputs),
        "layers": _layers(inputs),
        "sparse_execution": _sparse_execution(inputs, benchmark["rows"]),
        "search": inputs["search"].metrics if "search" in inputs else None,
        "adapt": inputs["adapt"].metrics if "adapt" in inputs else None,
        "skipped": [{"target": name, "reason": why} for name, why in recipe.skipped.items()],
        "warnings": [w for a in inputs.values() for w in a.metrics.get("warnings", [])],
        "machine": benchmark["machine"],
        "overrides": list(recipe.overrides),
        "versions": inputs["benchmark"].manifest["environment"]["versions"],
    }
