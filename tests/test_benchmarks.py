"""Every benchmark runs and ends with its line of JSON."""

import json
import subprocess
import sys

import pytest

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
