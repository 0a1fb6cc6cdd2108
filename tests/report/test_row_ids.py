"""Rows are found by id and kind; their names are only for readers."""

import json
from pathlib import Path

import pytest
from benchmark_rows import NAMES, benchmark_results, benchmark_row

from conftest import TINY, small_recipe
from sqft_export.artifacts.store import Artifact, Store
from sqft_export.errors import GateError
from sqft_export.measure.results import BenchmarkRow
from sqft_export.measure.rows import Row
from sqft_export.report.verdict import verdict
from sqft_export.run.gates import QualityGates
from sqft_export.stages import benchmark
from sqft_export.stages.benchmark import _add_shares_of_dense, _warnings, on_devices
from sqft_export.targets import devices

GPU = [devices.Device(runtime, "gpu", "GPU", None) for runtime in ("torch", "openvino")]


def table(tmp_path: Path, **fields) -> list[Row]:
    ids = ("dense", "dense-lora", "sparse-quantized", "adapted", "merged", "openvino", "onnx")
    return [Row(id, *NAMES[id], tmp_path, (), 0.0, **fields) for id in ids]


def measured(row: Row, accuracy: float, **fields) -> BenchmarkRow:
    """A result of a row; ids with a device have the kind and runtime of their row."""
    known = row.id.removesuffix(f"-{row.device}")
    found = benchmark_row(known, accuracy, name=row.name, device=row.device, **fields)
    return found.model_copy(update={"id": row.id})


@pytest.fixture
def on_a_gpu(tmp_path, monkeypatch) -> list[Row]:
    """The rows of ``benchmark.targets: [gpu]`` where torch and OpenVINO have a GPU."""
    monkeypatch.setattr(benchmark, "devices", lambda: GPU)
    return on_devices(table(tmp_path), ("gpu",))


def test_rows_on_a_gpu_have_separate_ids_and_the_same_kind(on_a_gpu):
    assert [(row.id, row.kind) for row in on_a_gpu][-2:] == [
        ("merged-gpu", "merged"),
        ("openvino-gpu", "deployment"),
    ]
    assert len({row.id for row in on_a_gpu}) == len(on_a_gpu)


def test_a_merged_row_that_torch_already_runs_on_the_gpu_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "devices", lambda: GPU)
    rows = on_devices(table(tmp_path, device="gpu"), ("gpu",))
    assert [row.id for row in rows].count("merged") == 1


def test_warnings_stay_when_only_a_gpu_is_measured(on_a_gpu):
    lower = {"merged-gpu": 0.2, "dense": 0.0}
    rows = [measured(row, lower.get(row.id, 0.6), interval=None) for row in on_a_gpu]
    rows = _add_shares_of_dense(rows, 0.0)
    found = _warnings(rows, was_tuned=True)
    assert any("accuracy of 'merged, GPU' is 0.2" in warning for warning in found)
    guessing = [row.model_copy(update={"perplexity": 5000.0}) for row in rows]
    assert any("dense base has a perplexity of 5000" in w for w in _warnings(guessing, True))


def test_the_verdict_and_the_gate_judge_deployments_on_a_gpu(on_a_gpu, tmp_path):
    rows = [measured(row, 0.8 if row.kind == "base" else 0.6) for row in on_a_gpu]
    assert verdict(rows, "exact match").startswith("OpenVINO, GPU, the best deployment")
    (tmp_path / "results.json").write_text(json.dumps(benchmark_results(*rows).to_json()))
    made = {"benchmark": Artifact(tmp_path, {"key": "0" * 64, "stage": "benchmark"})}
    gates = QualityGates(small_recipe("gates.accuracy_drop=5"), TINY, Store(tmp_path))
    with pytest.raises(GateError, match=r"merged, GPU answers 60\.0 % right"):
        gates.check("benchmark", made)


def test_other_names_change_no_judgement():
    accuracies = {"dense": 0.5, "dense-lora": 0.8, "sparse-quantized": 0.7, "merged": 0.4}
    rows = [benchmark_row(id, found) for id, found in accuracies.items()]
    rows.append(benchmark_row("openvino", 0.4, p_same_as_lora=0.001))
    renamed = [row.model_copy(update={"name": f"model {n}"}) for n, row in enumerate(rows)]
    assert len(_warnings(rows, True)) == len(_warnings(renamed, True)) == 1
    said, other = (verdict(each, "exact match") for each in (rows, renamed))
    for before, after in zip(rows[::-1], renamed[::-1], strict=True):
        said = said.replace(f"{before.name}'s 80", f"{after.name}'s 80")
    assert said.replace("OpenVINO,", "model 4,") == other
