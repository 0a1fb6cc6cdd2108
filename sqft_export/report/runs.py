"""`sqft-export compare`: compare several runs on one page.

Reads only ``report.json``, so runs may come from other machines. A run is named after the settings
in which it differs from the others.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sqft_export.errors import UserError
from sqft_export.measure.rows import FINAL_ROWS
from sqft_export.report import pictures
from sqft_export.report.document import DETAILS, MAIN, SCHEMA, cells
from sqft_export.report.html import render
from sqft_export.report.text import markdown
from sqft_export.report.verdict import choice
from sqft_export.run.artifact import MANIFEST, check_artifact
from sqft_export.textfiles import read_json
from sqft_export.untrusted import MAX_JSON_BYTES

REPORT = "report.json"
_ROUNDING_ERROR = 1e-9  # an accuracy may be outside its interval by this much


_Share = Annotated[float, Field(ge=0, le=1)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Amount = Annotated[_Finite, Field(ge=0)]


class _Spread(BaseModel):
    p10_ms: _Amount
    median_ms: _Amount
    p90_ms: _Amount

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.p10_ms <= self.median_ms <= self.p90_ms:
            raise ValueError("10th percentile, median and 90th percentile are not ascending")
        return self


class _Divergence(BaseModel):
    agreement: _Share
    kl_nats: _Finite


class _Row(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    runtime: Literal["torch", "openvino", "onnx", "gguf"]
    accuracy: _Share
    interval: Annotated[list[_Share], Field(min_length=2, max_length=2)] | None
    perplexity: float
    sparsity: _Share
    file_bytes: _Amount
    bits_per_weight: _Amount
    ttft: _Spread
    tpot: _Spread
    peak_memory_bytes: _Amount
    # These may be missing, but not null.
    recovery: _Amount = 1.0
    beside_dense: _Divergence = _Divergence(agreement=1.0, kl_nats=0.0)
    beside_merged: _Divergence = _Divergence(agreement=1.0, kl_nats=0.0)

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        low, high = self.interval or (0.0, 1.0)
        if not low - _ROUNDING_ERROR <= self.accuracy <= high + _ROUNDING_ERROR:
            raise ValueError(f"accuracy {self.accuracy} is outside its interval")
        return self


class _Machine(BaseModel):
    processor: str
    features: list[str]
    cores: int
    memory_bytes: int
    system: str
    python: str


class _Report(BaseModel):
    """The fields of a ``report.json`` that a comparison reads. The file is untrusted."""

    model_config = ConfigDict(strict=True)

    recipe: dict[str, Any]
    measure: str
    rows: list[_Row]
    settings: dict[str, Any]
    machine: _Machine


def _check_report(file: Path, document: dict[str, Any]) -> None:
    if document.get("schema") != SCHEMA:
        raise UserError(
            f"{file}: found schema {document.get('schema')!r}, this version reads {SCHEMA}; "
            "run the recipe again"
        )
    try:
        _Report.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{file}: {where}: {first['msg']}, found {str(first['input'])[:60]}"
        ) from error
    if not any(row["name"].startswith(FINAL_ROWS) for row in document["rows"]):
        raise UserError(
            f"{file}: found no row to compare, expected one of: {', '.join(FINAL_ROWS)}"
        )


@dataclass(frozen=True)
class Run:
    """A report and the settings of its recipe, as ``path -> value``."""

    key: str
    document: dict[str, Any]
    settings: dict[str, Any]


def report_of(folder: Path) -> Path:
    """Return the path of a folder's ``report.json``: its own, or the latest of a run.

    :raises UserError: if the folder has no report.
    """
    if (folder / REPORT).is_file():
        return folder / REPORT
    found = [f for f in folder.glob(f"report-*/{REPORT}") if (f.parent / MANIFEST).is_file()]
    if not found:
        raise UserError(f"{folder}: found no report; expected {REPORT} or a run that has one")
    return max(found, key=lambda file: file.stat().st_mtime)


def read_run(folder: Path) -> Run:
    """Read the report in a folder.

    :raises UserError: if the report is missing, damaged or of another version.
    """
    file = report_of(folder)
    if (file.parent / MANIFEST).is_file():
        check_artifact(file.parent)
    document = read_json(file, MAX_JSON_BYTES)
    _check_report(file, document)
    return Run(file.parent.name, document, dict(_flatten(document["recipe"])))


def _flatten(node: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, dict):
        return [pair for key, value in node.items() for pair in _flatten(value, f"{path}.{key}")]
    return [(path.removeprefix("."), node)]


def differing_settings(runs: list[Run]) -> list[str]:
    """Return the settings that are not equal in all runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({json.dumps(run.settings.get(name)) for run in runs}) > 1]


# Settings that do not change the model, only how and where it is measured.
MEASUREMENT_SETTINGS = ("name", "model.", "task.", "benchmark.", "verify.", "export.", "device")


def _names_of(runs: list[Run], fields: list[str]) -> list[str]:
    """Return a short name of every run: recipe or model if they differ, then settings if needed."""
    names = ["" for _ in runs]
    for source in (lambda run: str(run.settings.get("name")), _model_of):
        found = [source(run) for run in runs]
        if len(set(found)) > 1 and len(set(names)) < len(runs):
            names = [f"{name} {more}".strip() for name, more in zip(names, found, strict=True)]
    if len(set(names)) < len(runs):
        chosen = [field for field in fields if not field.startswith(MEASUREMENT_SETTINGS)]
        settings = [_settings_text(run, chosen) for run in runs]
        names = [", ".join(filter(None, pair)) for pair in zip(names, settings, strict=True)]
    names = [name or str(run.settings.get("name")) for name, run in zip(names, runs, strict=True)]
    return [
        name if names.count(name) == 1 else f"{name} ({number})"
        for number, name in enumerate(names, 1)
    ]


def _model_of(run: Run) -> str:
    """Return the last part of the model's path, or of its name on the hub."""
    found = run.settings.get("model.hub") or run.settings.get("model.path")
    return str(found).rstrip("/").rpartition("/")[2]


def _settings_text(run: Run, fields: list[str]) -> str:
    return ", ".join(f"{field.rpartition('.')[2]} {run.settings.get(field)}" for field in fields)


def comparison_of(runs: list[Run]) -> dict[str, Any]:
    """Return the document of ``comparison.json``.

    :raises UserError: if the runs were scored by different measures.
    """
    measures = {run.document["measure"] for run in runs}
    if len(measures) > 1:
        raise UserError(f"compare: found measures {' and '.join(sorted(measures))}; expected one")
    fields = differing_settings(runs)
    names = _names_of(runs, fields)
    rows = [
        row
        | {"name": f"{name}: {row['name']}", "run": name, "run_number": number}
        | {"label": f"{number}: {row['name']}"}
        for number, (name, run) in enumerate(zip(names, runs, strict=True), 1)
        for row in run.document["rows"]
        if row["name"].startswith(FINAL_ROWS)  # baselines are in the report of each run
    ]
    machines: list[dict[str, Any]] = []
    for run in runs:
        if run.document["machine"] not in machines:
            machines.append(run.document["machine"])
    warnings = []
    if len(machines) > 1:
        warnings.append("The runs are from different machines; their latencies cannot be compared")
    if len({str(run.document["settings"].get("items_sha256")) for run in runs}) > 1:
        warnings.append("The runs were not scored on the same items")
    return {
        "measure": measures.pop(),
        "runs": [
            {"name": name, "key": run.key, "settings": {f: run.settings.get(f) for f in fields}}
            for name, run in zip(names, runs, strict=True)
        ],
        "fields": fields,
        "choice": choice(rows),
        "rows": rows,
        "warnings": warnings,
        "machines": machines,
    }


def _mark_pareto_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with marks in their names.

    ``*``: on the Pareto front of accuracy and bytes. ``+``: on that of accuracy and TPOT.
    """
    marks = [""] * len(rows)
    for mark, cost in (("*", "file_bytes"), ("+", "tpot")):
        points = [(pictures.cost_of(row, cost), 100 * row["accuracy"]) for row in rows]
        front = pictures.pareto(points)
        marks = [m + mark * (p in front) for m, p in zip(marks, points, strict=True)]
    return [
        row | {"name": f"{row['name']} {m}".strip()} for row, m in zip(rows, marks, strict=True)
    ]


def compare_runs(folders: list[Path], out: Path) -> dict[str, Any]:
    """Write ``index.html``, ``comparison.json`` and ``comparison.md`` of several runs.

    :param folders: at least two runs or reports.
    :raises UserError: if a folder has no report, or the runs have different measures.
    """
    if len(folders) < 2:
        raise UserError(f"compare: found {len(folders)} run; expected at least two")
    document = comparison_of([read_run(folder) for folder in folders])
    rows, measure = document["rows"], document["measure"]
    drawn = [
        ("Accuracy against file size", pictures.runs_scatter(rows, measure, "file_bytes")),
        ("Accuracy against latency", pictures.runs_scatter(rows, measure, "tpot")),
        ("Latency", pictures.latency_bars(rows)),
    ]
    marked = _mark_pareto_rows(rows)
    table, main = cells(marked), cells(marked, MAIN)
    details = cells(marked, (MAIN[0], *DETAILS))
    out.mkdir(parents=True, exist_ok=True)
    page = render("comparison.html", document=document, table=main, details=details, pictures=drawn)
    (out / "comparison.json").write_text(json.dumps(document, indent=2) + "\n")
    first = f"{document['choice']}." if document["choice"] else None
    (out / "comparison.md").write_text(markdown(table, first))
    (out / "index.html").write_text(page)
    return document
