"""Verdict, next command and ``Report.best`` name the same deployment."""

from benchmark_rows import benchmark_row

from sqft_export.artifacts.store import Artifact
from sqft_export.report.document import Report
from sqft_export.report.terminal import run_text
from sqft_export.report.verdict import verdict


def test_a_faster_deployment_that_is_less_accurate_is_nowhere_the_best(tmp_path):
    rows = [benchmark_row("dense", 0.65), benchmark_row("openvino", 0.62, tpot=8.0)]
    rows += [benchmark_row("gguf", 0.3, tpot=2.0)]
    artifacts = {}
    for name in ("export-openvino", "export-gguf", "report"):
        (tmp_path / name / "model").mkdir(parents=True)
        artifacts[name] = Artifact(tmp_path / name, {})
    text = verdict(rows, "answered right")
    report = Report.model_construct(rows=rows, verdict=text)
    assert report.best is not None and report.best.id == "openvino"
    assert text is not None and text.startswith("OpenVINO")
    printed = run_text(report, artifacts, 120)
    assert f"next: sqft-export inspect {tmp_path}/export-openvino/model\n" in printed
