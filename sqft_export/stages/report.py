"""report: write one self-contained HTML page, a Markdown table and ``report.json``."""

import json

from sqft_export.adapters.files import read_training_log
from sqft_export.recipe.schema import Recipe
from sqft_export.report import pictures
from sqft_export.report.document import DETAILS, MAIN, cells, lm_eval_cells, report_of_run
from sqft_export.report.html import render
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
    "verify",
    "teacher",
    "baselines",
    "benchmark",
)
READS: tuple[str, ...] = ()
FREE: tuple[str, ...] = ()
VERSION = 13
RESUMES = False
DISTRIBUTED = False


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return all fields: the report shows the whole recipe."""
    return (*Recipe.model_fields, "overrides", "skipped")


def run(context: Context) -> dict:
    """Write ``index.html``, its pictures as SVG files, ``report.md`` and ``report.json``."""
    document = report_of_run(context.recipe, context.inputs)
    rows, measure = document["rows"], document["measure"]
    (context.folder / "report.json").write_text(json.dumps(document, indent=2) + "\n")
    text = markdown(cells(rows), document["verdict"]) + skipped_lines(document["skipped"])
    (context.folder / "report.md").write_text(text)
    drawn = [
        ("Accuracy along the passes", pictures.accuracy_bars(rows, measure)),
        ("Accuracy against file size", pictures.accuracy_scatter(rows, measure, "file_bytes")),
        ("Accuracy against latency", pictures.accuracy_scatter(rows, measure, "tpot")),
        ("Latency", pictures.latency_bars(rows)),
        ("Sparsity by layer", pictures.sparsity_by_layer(document["layers"])),
    ]
    if trained := context.path("adapt"):
        drawn.append(("Training", pictures.training_curve(read_training_log(trained))))
    if front := (document["search"] or {}).get("front"):
        drawn.append(("Search", pictures.search_front(front, measure)))
    for title, svg in drawn:
        (context.folder / f"{title.lower().replace(' ', '-')}.svg").write_text(svg)
    page = render(
        "report.html",
        document=document,
        table=cells(rows, MAIN),
        details=cells(rows, (MAIN[0], *DETAILS)),
        sets=[name for name in rows[0]["accuracy_by_set"] if name],
        lm_eval=lm_eval_cells(rows),
        recipe=json.dumps(document["recipe"], indent=2),
        pictures=drawn,
    )
    (context.folder / "index.html").write_text(page)
    return {"rows": len(rows)}
