"""Jobs and results of worker processes: typed, and refused with the field that is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sqft_export.errors import UserError
from sqft_export.measure.jobs import Job, LatencyRequest, MeasuredModel, Requests, WorkerResult
from sqft_export.measure.worker import measure_in_process


def job(folder: Path) -> dict:
    model = MeasuredModel(kind="torch", folder=folder, threads=1, device="cpu")
    latency = LatencyRequest(prompt=[1, 2], new_tokens=2, repeats=1)
    document = Job(model=model, requests=Requests(latency=latency), parent=os.getpid())
    return json.loads(document.model_dump_json())


def test_a_job_that_is_written_is_the_job_that_is_read(tmp_path):
    written = job(tmp_path)
    assert Job.parse(json.dumps(written), "job").model_dump_json() == json.dumps(
        written, separators=(",", ":")
    )


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("model", "kind", "tensorflow", "model.kind: Input should be 'torch', 'adapted'"),
        ("model", "threads", "two", "model.threads: Input should be a valid integer, found two"),
        ("requests", "latencies", {}, "requests.latencies: Extra inputs are not permitted"),
        ("requests", "latency", {"prompt": [1]}, "requests.latency.new_tokens: Field required"),
    ],
)
def test_a_worker_names_the_wrong_field_of_its_job(tmp_path, section, field, value, message):
    document = job(tmp_path)
    document[section][field] = value
    files = [tmp_path / "job.json", tmp_path / "result.json"]
    files[0].write_text(json.dumps(document))
    command = [sys.executable, "-m", "sqft_export.measure.worker", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and not files[1].exists()
    assert f"{files[0]}: {message}" in done.stderr.splitlines()[-1]


def test_a_result_that_lacks_a_figure_is_refused(tmp_path):
    text = json.dumps({"load_seconds": 1.0, "steady_memory_bytes": 1})
    with pytest.raises(UserError, match=r"the result: peak_memory_bytes: Field required"):
        WorkerResult.parse(text, "the result")
    with pytest.raises(UserError, match=r"the result: load_seconds: .* found 1"):
        WorkerResult.parse('{"load_seconds": "1"}', "the result")


def test_a_folder_that_is_no_model_fails_with_its_name(tmp_path):
    model = MeasuredModel(kind="onnx", folder=tmp_path, threads=1, device="cpu")
    with pytest.raises(UserError, match=rf"{tmp_path}: the measurement failed"):
        measure_in_process(model, Requests())
