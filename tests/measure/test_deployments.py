"""`sqft-export benchmark` on finished deployments: numbers for every folder, no torch needed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import ROOT, SQFT
from sqft_export.errors import UserError
from sqft_export.measure.deployments import benchmark_folders, names_of
from sqft_export.measure.results import DeploymentResults, DeviceSettings
from sqft_export.report.text import deployments_text


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [SQFT, "benchmark", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def folders(tiny_run) -> list[str]:
    onnx = tiny_run["export-onnx"].path
    return [
        str(folder)
        for folder in (
            tiny_run["export-openvino"].path / "model",
            onnx / "model",
            onnx / "packed",
        )
    ]


@pytest.fixture(scope="module")
def measured_files(folders, tmp_path_factory) -> tuple[dict, Path]:
    """The document and its folder, for the embedded task as a dataset of one set."""
    out = tmp_path_factory.mktemp("out")
    data = out / "data" / "gsm8k"
    data.mkdir(parents=True)
    test = ROOT / "sqft_export" / "builtin" / "tiny" / "test.jsonl"
    (data / "test.jsonl").write_text("".join(test.read_text().splitlines(keepends=True)[:6]))
    done = run(
        *folders,
        *("--rounds", "2", "--prompt-tokens", "16,40", "--new-tokens", "4", "--batch", "1,2"),
        *("--task", "gsm8k", "--data", str(data.parent), "--items", "6", "--threads", "2"),
        *("--reference", "--out", str(out), "--json"),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert json.loads((out / "results.json").read_text()) == document
    return document, out


@pytest.fixture(scope="module")
def measured(measured_files) -> tuple[dict, list[dict]]:
    """The document and the answers to items."""
    document, out = measured_files
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    return document, items


def test_every_folder_has_every_number(measured):
    document, _ = measured
    assert len(document["folders"]) == 3
    for row in document["folders"].values():
        assert set(row["ttft_ms"]) == {"16", "40"}
        assert set(row["tokens_per_second"]) == {"1", "2"}
        assert set(row["prompt_tokens_per_second"]) == {"1", "2"}
        assert min(row["prompt_tokens_per_second"].values()) > 0
        tpot = row["tpot_ms"]
        assert 0 < tpot["median"] <= tpot["p90"] <= tpot["p99"]
        assert row["peak_memory_bytes"] >= row["steady_memory_bytes"] > 1e7
        assert row["load_seconds"]["median"] > 0 and row["file_bytes"] > 1e6
    assert document["settings"]["threads"] == 2
    assert {"processor", "cores", "features"} <= set(document["machine"])
    assert {"openvino", "onnxruntime"} <= set(document["versions"])


def test_folders_are_compared_with_the_first_by_intervals(measured):
    document, _ = measured
    assert len(document["ratios"]) == 6  # two folders, three figures
    for ratio in document["ratios"]:
        assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
        assert ratio["warning"] == "fewer than 5 rounds: no verdict"


def test_accuracy_has_an_interval_and_every_answer_is_kept(measured):
    document, items = measured
    rows = document["accuracy"]
    for row in rows:
        low, high = row["interval"]
        assert low <= row["accuracy"] <= high and row["perplexity"] > 1
        low, high = row["perplexity_interval"]
        assert 1 <= low < row["perplexity"] < high
    assert rows[0]["p_same_as_first"] == 1.0
    dense, packed = rows[1:]
    assert dense["items"] == packed["items"]  # the same bytes, the same answers
    assert len(items) == 18 and {"folder", "item", "answer", "expected", "right"} <= set(items[0])


def test_agreement_is_with_the_first_on_the_same_tokens(measured):
    document, _ = measured
    onnx, packed = document["agreement"]
    assert onnx["tokens"] == packed["tokens"] > 50
    assert onnx["low"] <= onnx["agreement"] <= onnx["high"] and onnx["agreement"] > 0.9
    assert 0 <= onnx["kl_nats"] < 0.05
    assert (onnx["agreement"], onnx["kl_nats"]) == (packed["agreement"], packed["kl_nats"])


def test_divergence_from_the_reference_needs_no_torch_folder(measured):
    document, _ = measured
    found = document["reference"]
    assert set(found) == set(document["folders"])
    for row in found.values():
        assert row["same_top"] >= 0.9 * row["positions"] > 50
        assert 0 <= row["kl_nats"] < 0.02 and row["kl_nats"] <= row["largest_kl_nats"]


def test_every_deployment_has_a_file_with_the_field_names_of_other_tools(measured_files):
    document, out = measured_files
    for name, row in document["folders"].items():
        found = json.loads((out / f"{name.replace('/', '-')}.json").read_text())
        assert set(found["sources"]) == {"lm_eval", "llm_bench", "sqft_export"}
        [task] = found["lm_eval"]["results"].values()
        assert {"acc,none", "acc_stderr,none", "perplexity,none"} <= task.keys()
        results = found["llm_bench"]["perfdata"]["results"]
        assert [one["input_size"] for one in results] == [16, 40]
        for one in results:
            assert one["first_latency"] == row["ttft_ms"][str(one["input_size"])]["median"]
            assert one["second_avg_latency"] == row["tpot_ms"]["median"]
        assert found["sqft_export"]["figures"] == row
        assert found["sqft_export"]["reference"] == document["reference"][name]


def test_prompts_that_do_not_fit_are_left_out(tiny_run):
    folder = tiny_run["export-onnx"].path / "model"
    settings = DeviceSettings(prompt_tokens=(8, 10**6), new_tokens=2, batches=(1,), rounds=1)
    document = benchmark_folders([folder], settings)
    assert document.settings.prompt_tokens == (8,)
    with pytest.raises(UserError, match="the context of a model is 256 tokens"):
        benchmark_folders([folder], replace(settings, prompt_tokens=(10**6,)))


def test_a_merged_folder_is_measured_on_torch(tiny_run):
    settings = DeviceSettings(prompt_tokens=(8,), new_tokens=2, batches=(1,), rounds=1)
    document = benchmark_folders([tiny_run["merge"].path / "model"], settings)
    (row,) = document.folders.values()
    assert row.runtime == "torch" and row.tpot_ms.median > 0


def test_the_table_names_what_can_not_be_measured(measured):
    document, _ = measured
    text = deployments_text(DeploymentResults.parse(json.dumps(document), "results.json"))
    known = all(row["joules_per_token"] is not None for row in document["folders"].values())
    assert known or "not readable" in text
    assert "TPOT ms" in text and "accuracy:" in text and "p99" in text


def test_names_are_what_tells_folders_apart(tmp_path):
    folders = [tmp_path / "runs" / name / "model" for name in ("a", "b")]
    assert names_of(folders) == ["a", "b"]
    assert names_of(folders[:1]) == ["model"]


def test_bad_input_is_told_before_anything_runs(folders, tmp_path):
    for arguments, message in (
        ((str(tmp_path),), "not a deployment"),
        ((folders[1], "--batch", "1,x"), "--batch: found '1,x'"),
        ((folders[1], "--task", "gsm8"), "--task: found 'gsm8'; allowed are gsm8k"),
        ((folders[1], "--task", "gsm8k", "--data", str(tmp_path)), "no test file of gsm8k"),
        ((folders[0], "--device", "npu"), "found npu, which openvino can't use on this machine"),
        ((folders[0], "--device", "tpu"), "it has no such device"),
        ((folders[1], "--cpus", "999"), "this machine has 0 to"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and message in done.stderr, (arguments, done.stderr)


def test_measuring_imports_no_torch(folders):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from sqft_export.measure import deployments, worker\n"
        "from sqft_export.targets import target\n"
        f"target('onnx').open_session(Path({folders[1]!r}), False, 1)\n"
        f"target('openvino').open_session(Path({folders[0]!r}), False, 1)\n"
        f"deployments.questions_of(Path({folders[0]!r}), None, None, Path('README.md'), 2)\n"
        "heavy = {'torch', 'transformers', 'peft', 'nncf', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
