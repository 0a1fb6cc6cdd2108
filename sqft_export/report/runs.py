"""`sqft-export compare`: compare several runs on one page.

Reads only ``report.json``, so runs may come from other machines. A run is named after the settings
in which it differs from the others.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from sqft_export.artifacts.store import MANIFEST, check_artifact
from sqft_export.documents import Document
from sqft_export.errors import UserError
from sqft_export.machine.counters import MachineFacts
from sqft_export.measure.results import FINAL_KINDS, BenchmarkRow
from sqft_export.report import pictures
from sqft_export.report.document import REPORT, Report, read_report
from sqft_export.report.html import render
from sqft_export.report.tables import DETAILS, MAIN, cells
from sqft_export.report.text import markdown
from sqft_export.report.verdict import choice


@dataclass(frozen=True)
class ReportedRun:
    """A report and the settings of its recipe, as ``path -> value``."""

    key: str
    report: Report
    settings: dict[str, JsonValue]


class ComparedRun(Document):
    """A run in a comparison; ``settings`` are those that differ."""

    name: str
    key: str
    settings: dict[str, JsonValue]


class ComparedRow(BenchmarkRow):
    """A row of a run; its name begins with the name of the run.

    label: a shorter name, with the number of the run.
    """

    run: str
    run_number: int
    label: str


class Comparison(Document):
    """``comparison.json``.

    fields: settings that differ.
    choice: the most accurate, the smallest and the fastest row, as a sentence.
    """

    measure: str
    runs: list[ComparedRun]
    fields: list[str]
    choice: str | None
    rows: list[ComparedRow]
    warnings: list[str]
    machines: list[MachineFacts]


def latest_report(run: Path) -> Path | None:
    """Return the folder of a run's newest sealed report; None if it has none."""
    return newest_artifact(run, "report")


def newest_artifact(run: Path, stage: str) -> Path | None:
    """Return the folder of the newest sealed artifact of a pass; None if the run has none."""
    sealed = list(run.glob(f"{stage}-*/{MANIFEST}"))
    newest = max(sealed, key=lambda manifest: manifest.stat().st_mtime, default=None)
    return newest.parent if newest else None


def report_of(folder: Path) -> Path:
    """Return the path of a folder's ``report.json``: its own, or the latest of a run.

    :raises UserError: if the folder has no report.
    """
    if (folder / REPORT).is_file():
        return folder / REPORT
    if latest := latest_report(folder):
        return latest / REPORT
    raise UserError(f"{folder}: found no report; expected {REPORT} or a run that has one")


def read_run(folder: Path) -> ReportedRun:
    """Read the report in a folder.

    :raises UserError: if the report is missing, damaged or of another version.
    """
    file = report_of(folder)
    if (file.parent / MANIFEST).is_file():
        check_artifact(file.parent)
    report = read_report(file)
    if not any(row.kind in FINAL_KINDS for row in report.rows):
        raise UserError(
            f"{file}: rows: found no merged model and no deployment; expected at least one"
        )
    return ReportedRun(file.parent.name, report, dict(_flatten(report.recipe)))


def _flatten(node: JsonValue, path: str = "") -> list[tuple[str, JsonValue]]:
    if isinstance(node, dict):
        return [pair for key, value in node.items() for pair in _flatten(value, f"{path}.{key}")]
    return [(path.removeprefix("."), node)]


def differing_settings(runs: list[ReportedRun]) -> list[str]:
    """Return the settings that are not equal in all runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({json.dumps(run.settings.get(name)) for run in runs}) > 1]


# Settings that do not change the model, only how and where it is measured.
MEASUREMENT_SETTINGS = ("name", "model.", "task.", "benchmark.", "verify.", "export.", "device")


def _names_of(runs: list[ReportedRun], fields: list[str]) -> list[str]:
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


def _model_of(run: ReportedRun) -> str:
    """Return the last part of the model's path, or of its name on the hub."""
    found = run.settings.get("model.hub") or run.settings.get("model.path")
    return str(found).rstrip("/").rpartition("/")[2]


def _settings_text(run: ReportedRun, fields: list[str]) -> str:
    return ", ".join(f"{field.rpartition('.')[2]} {run.settings.get(field)}" for field in fields)


def comparison_of(runs: list[ReportedRun]) -> Comparison:
    """Return the document of ``comparison.json``.

    :raises UserError: if the runs were scored by different measures.
    """
    measures = {run.report.measure for run in runs}
    if len(measures) > 1:
        raise UserError(f"compare: found measures {' and '.join(sorted(measures))}; expected one")
    fields = differing_settings(runs)
    names = _names_of(runs, fields)
    rows = [
        _compared_row(row, name, number)
        for number, (name, run) in enumerate(zip(names, runs, strict=True), 1)
        for row in run.report.rows
        if row.kind in FINAL_KINDS  # baselines are in the report of each run
    ]
    machines: list[MachineFacts] = []
    for run in runs:
        if run.report.machine not in machines:
            machines.append(run.report.machine)
    warnings = []
    if len(machines) > 1:
        warnings.append("The runs are from different machines; their latencies cannot be compared")
    if len({run.report.settings.items_sha256 for run in runs}) > 1:
        warnings.append("The runs were not scored on the same items")
    return Comparison(
        measure=measures.pop(),
        runs=[
            ComparedRun(name=name, key=run.key, settings={f: run.settings.get(f) for f in fields})
            for name, run in zip(names, runs, strict=True)
        ],
        fields=fields,
        choice=choice(rows),
        rows=rows,
        warnings=warnings,
        machines=machines,
    )


def _compared_row(row: BenchmarkRow, run: str, number: int) -> ComparedRow:
    """Return a row of a run with the name and the number of the run."""
    found = {name: getattr(row, name) for name in row.model_fields_set}
    return ComparedRow(
        **found | {"name": f"{run}: {row.name}"},
        run=run,
        run_number=number,
        label=f"{number}: {row.name}",
    )


def _mark_pareto_rows(rows: Sequence[BenchmarkRow]) -> list[BenchmarkRow]:
    """Return the rows with marks in their names.

    ``*``: on the Pareto front of accuracy and bytes. ``+``: on that of accuracy and TPOT.
    """
    marks = [""] * len(rows)
    for mark, cost in (("*", "file_bytes"), ("+", "tpot")):
        points = [(pictures.cost_of(row, cost), 100 * row.accuracy) for row in rows]
        front = pictures.pareto(points)
        marks = [m + mark * (p in front) for m, p in zip(marks, points, strict=True)]
    return [
        row.model_copy(update={"name": f"{row.name} {mark}".strip()})
        for row, mark in zip(rows, marks, strict=True)
    ]


def compare_runs(folders: list[Path], out: Path) -> Comparison:
    """Write ``index.html``, ``comparison.json`` and ``comparison.md`` of several runs.

    :param folders: at least two runs or reports.
    :raises UserError: if a folder has no report, or the runs have different measures.
    """
    if len(folders) < 2:
        raise UserError(f"compare: found {len(folders)} run; expected at least two")
    comparison = comparison_of([read_run(folder) for folder in folders])
    rows, measure, document = comparison.rows, comparison.measure, comparison.to_json()
    numbers = [row.run_number for row in rows]
    drawn = [
        ("Accuracy against file size", pictures.runs_scatter(rows, numbers, measure, "file_bytes")),
        ("Accuracy against latency", pictures.runs_scatter(rows, numbers, measure, "tpot")),
        ("Latency", pictures.latency_bars(rows, [row.label for row in rows])),
    ]
    drawn = pictures.add_titles(drawn)
    marked = _mark_pareto_rows(rows)
    table, main = cells(marked), cells(marked, MAIN)
    details = cells(marked, (MAIN[0], *DETAILS))
    out.mkdir(parents=True, exist_ok=True)
    page = render("comparison.html", document=document, table=main, details=details, pictures=drawn)
    (out / "comparison.json").write_text(json.dumps(document, indent=2) + "\n")
    first = f"{comparison.choice}." if comparison.choice else None
    (out / "comparison.md").write_text(markdown(table, first))
    (out / "index.html").write_text(page)
    return comparison
