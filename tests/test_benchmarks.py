"""Every benchmark runs and ends with its line of JSON."""

import json
import subprocess
import sys

import pytest
from chat_model import write_chat_model

from conftest import ROOT, random_model


@pytest.mark.slow
def test_compression_prints_its_table_and_one_json_line(tmp_path):
    model = random_model(tmp_path / "model", intermediate_size=128)
    text = tmp_path / "t.txt"
    text.write_text("\n".join(f"Tom has {i} apples and {i * 7} eggs." for i in range(3000)))
    arguments = ["--model", str(model), "--text", str(text), "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "compression.py"), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    document = json.loads(done.stdout.splitlines()[-1])
    assert set(document) == {"benchmark", "machine", "versions", "ratios", "values"}
    assert set(document["ratios"]["gptq_time"]) == {"median", "low", "high"}
    aware = document["values"]["wanda/gptq mask-aware/4"]
    plain = document["values"]["wanda/gptq plain/4"]
    assert aware["zeros_kept"] == 1.0 > plain["zeros_kept"]


@pytest.mark.slow
def test_streaming_stays_under_its_bound_on_a_narrow_model():
    command = [sys.executable, str(ROOT / "benchmarks" / "streaming.py"), "--small"]
    done = subprocess.run(
        [*command, "--blocks", "1", "3"], capture_output=True, text=True, check=True
    )
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["ratios"]["peak_over_bound"]["high"] < 1
    assert set(document["values"]) == {"1", "3"}


@pytest.mark.slow
def test_codes_in_llama_cpp_lose_less_than_its_own_quantizer(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gguf_parity.py"), "--small"]
    done = subprocess.run(
        [*command, "--items", "4", "--rounds", "1", "--runs", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    document = json.loads(done.stdout.splitlines()[-1])
    rows = document["values"]["tiny"]
    assert set(rows) == {"torch", "ours", "llama.cpp Q4_0", "llama.cpp Q8_0"}
    assert document["ratios"]["tiny_kl_ours_over_requantized"]["median"] < 0.5


@pytest.mark.slow
def test_worth_prints_differences_in_points_and_resumes(tmp_path):
    model = write_chat_model(tmp_path / "model", tmp_path / "scratch", hidden_size=64)
    folder = tmp_path / "data" / "banking77"
    folder.mkdir(parents=True)
    for split, count in (("train", 40), ("test", 8)):
        rows = [f"{split} where is my card {n},card_{n % 3}" for n in range(count)]
        (folder / f"{split}.csv").write_text("\n".join(["text,category", *rows]))
    script = str(ROOT / "benchmarks" / "worth.py")
    command = [sys.executable, script, "--model", str(model), "--data", str(tmp_path / "data")]
    command += ["--tasks", "banking77", "--seeds", "0", "--steps", "1", "2", "--items", "6"]
    command += ["--validation", "4", "--runs", str(tmp_path / "runs")]
    command += ["--set", "calibration.samples=4", "adapt.batch=2"]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2)
    )
    values = json.loads(first.stdout.splitlines()[-1])["values"]
    for row in ("base", "lora", "lora_then_int4", "dense_int4", "sparse_int4"):
        name = f"{row}_minus_lora_then_q4_k_m"
        assert values[f"pooled_{name}"] == values[f"banking77_{name}"]
        assert 0 < values[f"pooled_{name}_p"] <= 1
    assert first.stdout.count("# banking77, ") == 13  # base once, all others at both steps
    assert "# banking77, " not in second.stdout
    assert (
        second.stdout.splitlines()[-1] != ""
        and values == json.loads(second.stdout.splitlines()[-1])["values"]
    )


def run_scaling(out, *options: str) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--small"]
    command += ["--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_scaling_predicts_hours_between_the_ideal_and_one_machine(tmp_path):
    document = run_scaling(tmp_path / "nodes", "--part", "nodes")
    hours = document["values"]["nodes"]
    assert set(hours) == {"1", "2", "4", "8"}
    assert all(found["ideal"] <= found["hours"] <= hours["1"]["hours"] for found in hours.values())


@pytest.mark.slow
def test_scaling_measures_two_processes_and_kills(tmp_path):
    document = run_scaling(
        tmp_path / "all", "--part", "processes", "--part", "kill", "--rounds", "1"
    )
    names = {f"{name}_one_over_two_processes" for name in ("sparsify", "quantize", "search")}
    assert set(document["ratios"]) == names
    lost = document["values"]["lost_seconds"]
    assert {"sparsify", "quantize", "adapt", "benchmark"} <= set(lost)
