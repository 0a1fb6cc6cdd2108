"""``report.json``: one model writes it, reads it and gives its JSON schema."""

import json
import shutil
from pathlib import Path

import pytest
from benchmark_rows import benchmark_row

from conftest import ROOT
from sqft_export.artifacts.store import Artifact
from sqft_export.errors import UserError
from sqft_export.metrics import MergeMetrics, read_metrics
from sqft_export.report.document import Report, read_report

SCHEMA = json.loads((ROOT / "docs" / "reference" / "report.schema.json").read_text())


def resolve(schema: dict) -> dict:
    return SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema


def faults(value: object, schema: dict, place: str = "report") -> list[str]:
    """Keys of a document that its schema does not list, and required ones that it lacks."""
    schema = resolve(schema)
    options = [resolve(option) for option in schema.get("anyOf", [])]
    if options:
        kinds = {dict: "object", list: "array", type(None): "null"}
        wanted = [o for o in options if o.get("type") == kinds.get(type(value), o.get("type"))]
        schema = wanted[0] if wanted else schema
    if isinstance(value, list):
        inner = schema.get("items", {})
        return [f for n, one in enumerate(value) for f in faults(one, inner, f"{place}.{n}")]
    if not isinstance(value, dict) or "properties" not in schema:
        return []
    known = schema["properties"]
    wrong = {*value} - {*known} | {*schema.get("required", [])} - {*value}
    return [f"{place}.{name}" for name in wrong] + [
        fault for name in value for fault in faults(value[name], known.get(name, {}), name)
    ]


def test_a_report_is_read_as_it_was_written_and_fits_the_schema(tiny_run):
    file = tiny_run["report"].path / "report.json"
    document = json.loads(file.read_text())
    assert read_report(file).to_json() == document
    assert faults(document, SCHEMA) == []
    assert faults(document | {"extra": 1}, SCHEMA) == ["report.extra"]
    kinds = {row["id"]: row["kind"] for row in document["rows"]}
    assert kinds["dense"] == "base" and kinds["openvino-packed"] == "deployment"
    assert len(kinds) == len(document["rows"])


def test_the_best_row_is_the_fastest_deployment_that_is_as_accurate():
    dense, worse = benchmark_row("dense", 0.9, 1.0), benchmark_row("gguf", 0.3, 2.0)
    slow, fast = benchmark_row("openvino", 0.62, 8.0), benchmark_row("onnx", 0.6, 4.0)
    report = Report.model_construct(rows=[dense, worse, slow, fast])
    assert report.best == fast and report.best.tokens_per_second == 250
    exact = [row.model_copy(update={"interval": None}) for row in (worse, slow, fast)]
    assert Report.model_construct(rows=exact).best.id == "openvino"
    assert Report.model_construct(rows=[dense]).best is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1}', "found schema 1, this version reads 5; run the recipe again"),
        ("[]", "found schema None, this version reads 5"),
        ('{"schema": 5, "schema": 5}', "the key 'schema' appears twice"),
        ('{"schema": 5}', "recipe: Field required"),
    ],
)
def test_a_file_that_is_no_report_is_refused_with_the_reason(tmp_path, text, message):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_report(tmp_path / "report.json")


def test_an_unknown_field_of_a_row_is_named(tiny_run, tmp_path):
    file = Path(shutil.copy(tiny_run["report"].path / "report.json", tmp_path))
    document = json.loads(file.read_text())
    document["rows"][1]["speed"] = 1
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"report.json: rows.1.speed: Extra inputs"):
        read_report(file)


def test_a_metric_of_another_type_is_named(tmp_path):
    artifact = Artifact(tmp_path, {"metrics": {"sparsity": {"all": "half"}, "facts": {}}})
    with pytest.raises(UserError, match=r"manifest.json: metrics: sparsity.all: .* found half"):
        read_metrics(artifact, MergeMetrics)
