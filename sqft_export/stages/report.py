"""report: write one self-contained HTML page, a Markdown table and ``report.json``."""

import json

from sqft_export.adapters.files import read_training_log
from sqft_export.measure.peers import PEER_STAGES
from sqft_export.metrics import RowsMetrics
from sqft_export.model.chat import uses_template
from sqft_export.recipe.schema import Recipe
from sqft_export.report import pictures
from sqft_export.report.document import REPORT, report_of_run
from sqft_export.report.html import render
from sqft_export.report.tables import DETAILS, MAIN, cells, lm_eval_cells, note_lines
from sqft_export.report.terminal import deployment_folders
from sqft_export.report.text import markdown, skipped_lines
from sqft_export.stages import Context

CONSUMES: tuple[str, ...] = (
    "sparsify",
    "reconstruct",
    "quantize",
    "adapt",
    "search",
    "merge",
    "export-openvino",
    "export-onnx",
    "export-gguf",
    "export-web",
    "verify",
    "teacher",
    "baselines",
    *PEER_STAGES,
    "benchmark",
)
READS: tuple[str, ...] = ()
FREE: tuple[str, ...] = ()
VERSION = 16
RESUMES = False
DISTRIBUTED = False


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return all fields, since the report shows the recipe; loggers change no result."""
    shown = [name for name in Recipe.model_fields if name != "log"]
    return (*shown, "overrides", "skipped")


def run(context: Context[Recipe]) -> RowsMetrics:
    """Write ``index.html``, its pictures as SVG files, ``report.md`` and ``report.json``."""
    report = report_of_run(context.recipe, context.inputs)
    rows, measure, document = report.rows, report.measure, report.to_json()
    (context.folder / REPORT).write_text(json.dumps(document, indent=2) + "\n")
    skipped = {one.target: one.reason for one in report.skipped}
    text = markdown(cells(rows), report.verdict) + skipped_lines(skipped)
    text += "".join(f"\n{line}\n" for line in note_lines(rows))
    (context.folder / "report.md").write_text(text)
    sparsity = {one.layer: one.sparsity for one in report.layers}
    drawn = [
        ("Accuracy along the passes", pictures.accuracy_bars(rows, measure)),
        ("Accuracy against file size", pictures.accuracy_scatter(rows, measure, "file_bytes")),
        ("Accuracy against latency", pictures.accuracy_scatter(rows, measure, "tpot")),
        ("Latency", pictures.latency_bars(rows, [row.name for row in rows])),
        ("Sparsity by layer", pictures.sparsity_by_layer(sparsity)),
    ]
    if trained := context.path("adapt"):
        held_out = report.adapt.held_out if report.adapt else []
        curve = pictures.training_curve(read_training_log(trained), held_out)
        drawn.append(("Training", curve))
    if report.search and report.search.front:
        drawn.append(("Search", pictures.search_front(report.search.front, measure)))
    drawn = pictures.add_titles(drawn)
    for title, svg in drawn:
        (context.folder / f"{title.lower().replace(' ', '-')}.svg").write_text(svg)
    page = render(
        "report.html",
        document=document,
        table=cells(rows, MAIN),
        details=cells(rows, (MAIN[0], *DETAILS)),
        sets=[name for name in rows[0].accuracy_by_set if name],
        lm_eval=lm_eval_cells(rows),
        notes=note_lines(rows),
        commands=_commands(context),
        recipe=json.dumps(report.recipe, indent=2),
        pictures=drawn,
    )
    (context.folder / "index.html").write_text(page)
    return RowsMetrics(rows=len(rows))


def _commands(context: Context[Recipe]) -> list[tuple[str, str]]:
    """Return the name of every deployment with the command that runs it in the run's folder."""
    word = "chat" if uses_template(context.recipe.task) else "generate"
    return [
        (one.name, f'sqft-export {word} {one.folder.parent.name}/{one.folder.name} -p "..."')
        for one in deployment_folders(context.inputs)
    ]
