"""The whole pipeline on the embedded model: skip, resume, damage, and the same bytes twice."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from conftest import copy_run, small_recipe, start_run
from sqft_export.artifacts.store import Store
from sqft_export.errors import UserError
from sqft_export.kernels.llama_plugin import why_not_in_llama_cpp
from sqft_export.machine.device import CPU, fast_in_bfloat16
from sqft_export.run.pipeline import _lock_run_folder, plan_passes, run_recipe
from sqft_export.targets.execution import LLAMA_CPP_WITH_KERNELS


def merged_digests(artifacts: dict) -> dict[str, str]:
    return artifacts["merge"].manifest["files"]


def test_every_check_of_verify_passed(tiny_run):
    checks = {c["name"]: c for c in tiny_run["verify"].metrics["checks"]}
    assert all(c["passed"] for c in checks.values())
    for needed in (
        "pruned positions zero in sparsify",
        "pruned positions zero in quantize",
        "pruned positions zero in the trained forward",
        "pruned positions zero in the merged model",
        "pruned positions zero in openvino",
        "pruned positions zero in onnx",
        "weights of the trained forward, merged",
        "embeddings, norms, biases, merged",
        "logits of the trained model and merged",
        "float weights: merged and openvino",
        "float weights: merged and onnx",
        "token ids: base and OpenVINO GenAI",
        "token ids: base and ONNX Runtime GenAI",
        "codes, scales, zero points: merged and openvino",
        "codes, scales, zero points: merged and onnx",
        "layers on compressed kernels in openvino",
        "greedy tokens: merged in torch and openvino",
        "greedy tokens: merged in torch and onnx",
    ):
        assert checks[needed]["compared"] > 0, needed
    assert checks["logits: merged in torch and openvino"]["allowed"] == 1e-4


def test_the_report_shows_every_row_with_every_number(tiny_run):
    folder = tiny_run["report"].path
    document = json.loads((folder / "report.json").read_text())
    on_kernels = [] if why_not_in_llama_cpp() else [LLAMA_CPP_WITH_KERNELS]
    assert [row["name"] for row in document["rows"]] == [
        "dense base",
        "dense + LoRA",
        "sparse",
        "sparse + INT4",
        "LoRA, then GPTQ, llama.cpp",
        "LoRA, then GPTQ, OpenVINO",
        "LoRA, then Q4_K_M, llama.cpp",
        "tuned, unmerged",
        "merged",
        "OpenVINO",
        "OpenVINO, packed",
        "OpenVINO, sparse execution",
        "ONNX Runtime",
        "ONNX Runtime, packed",
        "llama.cpp",
        "llama.cpp, packed",
        *on_kernels,
    ]
    assert document["sparse_execution"]["products"] == {"mask": 28}
    assert document["sparse_execution"]["bytes_ratio"] < 1
    for row in document["rows"]:
        assert 0 <= row["accuracy"] <= 1
        assert row["perplexity"] > 1
        assert row["file_bytes"] > 1e5
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        assert row["peak_memory_bytes"] > 1e7
        assert row["ttft"]["median_ms"] > 0
        assert row["tpot"]["p10_ms"] <= row["tpot"]["median_ms"] <= row["tpot"]["p90_ms"]
    tuned, merged, _, _, _, *dense_and_packed = document["rows"][7:16]
    for dense, packed in zip(dense_and_packed[::2], dense_and_packed[1::2], strict=True):
        assert packed["file_bytes"] < dense["file_bytes"]
        assert packed["accuracy"] == dense["accuracy"]
    # In bfloat16, where that is fast, one has rounded weights, the other rounded scales.
    rounding = 2**-7 if fast_in_bfloat16(CPU) else 0
    assert tuned["perplexity"] == pytest.approx(merged["perplexity"], rel=rounding, abs=0)
    page = (folder / "index.html").read_text()
    assert page.count("<svg") == 6
    assert not re.findall(r'(?:src|href)="https?:', page)
    text = (folder / "report.md").read_text()
    for row in document["rows"]:
        assert f"\n| {row['name']} |" in text
        assert all(text.count(f": {note}\n") == 1 for note in row["notes"])


def test_training_log_has_the_rank_of_every_group_at_every_step(tiny_run):
    lines = (tiny_run["adapt"].path / "training.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in log] == list(range(1, 13))
    assert {rank for entry in log for rank in entry["ranks"].values()} == {32, 24, 16}
    assert len(log[0]["ranks"]) == 4


def test_nothing_changed_is_all_cached(tiny_run):
    root = tiny_run["merge"].path.parent
    again = run_recipe(small_recipe(), root)
    for name, artifact in tiny_run.items():
        assert again[name].manifest == artifact.manifest
    assert {p.name for p in root.iterdir() if p.is_dir()} == {
        artifact.path.name for artifact in tiny_run.values()
    }


def test_a_changed_option_reruns_only_what_follows(tiny_run):
    root = tiny_run["merge"].path.parent
    steps = plan_passes(
        small_recipe("verify.prompts=4"),
        small_recipe().resolve("builtin:tiny"),
        Store(root),
    )
    to_run = [step.name for step in steps if step.artifact is None]
    assert to_run == ["verify", "report"]


def test_damage_stops_the_run_and_names_the_file(tiny_run, tmp_path):
    root = copy_run(tiny_run, tmp_path)
    weights = root / tiny_run["quantize"].path.name / "model" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(UserError, match=r"quantize-.*model.safetensors is damaged"):
        run_recipe(small_recipe(), root)


def kill_when(process: subprocess.Popen, root: Path, pattern: str) -> None:
    """SIGKILL as soon as a path appears."""
    deadline = time.monotonic() + 120
    while not list(root.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{pattern} did not appear"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bytes(tiny_run, tmp_path):
    """Killed while it sparsifies, quantizes, trains (past a checkpoint) and exports; and so this
    is also the second run of the same recipe whose merged model is byte-identical."""
    for pattern in (
        "tiny/sparsify-*.partial/model/*",
        "tiny/quantize-*.partial/model/*",
        "tiny/adapt-*.partial/training/checkpoint-4/complete",
        "tiny/export-openvino-*.partial/model/traced/*",
    ):
        kill_when(start_run(tmp_path), tmp_path, pattern)
    resumed = run_recipe(small_recipe(), tmp_path / "tiny")
    assert merged_digests(resumed) == merged_digests(tiny_run)
    exported = ("openvino_model.bin", "model.onnx.data")
    for name, file in zip(("export-openvino", "export-onnx"), exported, strict=True):
        key = f"model/{file}"
        assert resumed[name].manifest["files"][key] == tiny_run[name].manifest["files"][key]


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with (
        _lock_run_folder(tmp_path),
        pytest.raises(UserError, match="another run is working here"),
        _lock_run_folder(tmp_path),
    ):
        pass


def test_the_last_line_on_stdout_is_the_report(tiny_cli, tiny_run):
    lines = tiny_cli.stdout.splitlines()
    report = json.loads((tiny_run["report"].path / "report.json").read_text())
    assert json.loads(lines[-1]) == report
    assert lines[0] == report["verdict"]
    assert lines[2].startswith("| model | accuracy |")
    # A bar for every pass is for terminals; elsewhere one line a pass, and nothing of libraries.
    # (On a slow machine a pass also says once a minute where it is.)
    said = dict.fromkeys(line.split()[0] for line in tiny_cli.stderr.splitlines())
    assert [name for name in said if name in tiny_run] == list(tiny_run)
