"""llama.cpp with our kernels as a user starts it, in the llama.cpp of an installed package."""

import json
import logging
import re
import subprocess
from pathlib import Path

import pytest

from conftest import SQFT, test_prompts
from sqft_export.inference.locate import deployments_of_run
from sqft_export.kernels.llama_plugin import why_not_in_llama_cpp
from sqft_export.targets.execution import usable_execution

OURS = "llama.cpp with our kernels"
COUNT = r"sqft: \d+ tensors on our kernels"

needs_kernels = pytest.mark.skipif(
    why_not_in_llama_cpp() is not None, reason=str(why_not_in_llama_cpp())
)


def sqft(*arguments: str | Path) -> subprocess.CompletedProcess:
    done = subprocess.run([SQFT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tiny_run) -> Path:
    return tiny_run["export-gguf"].path / "model"


@needs_kernels
def test_generate_runs_on_our_kernels_and_names_them(folder):
    (prompt,) = test_prompts(1)
    words = ("generate", folder, "-p", prompt, "--max-new-tokens", "4")
    stock, ours = sqft(*words), sqft(*words, "--execution", "auto")
    assert OURS in ours.stderr and re.search(COUNT, ours.stderr)
    assert OURS not in stock.stderr and not re.search(COUNT, stock.stderr)
    assert ours.stdout == stock.stdout != "\n"


@needs_kernels
def test_verify_runs_both_modes_on_our_kernels(folder):
    """In exact mode, weights stay quantized and activations are float32."""
    done = sqft("verify", folder, "--execution", "auto", "--json")
    found = json.loads(done.stdout)
    assert found["kernels"] == OURS and found["passed"]
    exact, default = found["modes"]
    assert exact["largest_kl"] < 1e-3 and exact["mean_kl"] < default["mean_kl"]
    assert "skipped" not in exact and re.search(COUNT, done.stderr)


@needs_kernels
def test_benchmark_has_a_row_for_either_kernels_and_names_the_build(folder):
    settings = ("--prompt-tokens", "8", "--new-tokens", "2", "--batch", "1", "--rounds", "1")
    done = sqft("benchmark", folder, "--execution", "stock,auto", *settings, "--json")
    found = json.loads(done.stdout)["folders"]
    assert list(found) == ["model, llama.cpp", f"model, {OURS}"]
    (stock,), (ours,) = (row["notes"] for row in found.values())
    assert re.fullmatch(r"llama\.cpp of \S+ \S+, an \w+ build", stock)
    assert ours == f"{stock}, with our kernels (auto)"


@needs_kernels
def test_a_run_lists_its_gguf_deployment_on_our_kernels_too(tiny_run, folder):
    found = {one.name: one for one in deployments_of_run(tiny_run["report"].path.parent)}
    ours, stock = found[OURS], found["llama.cpp"]
    assert ours.path == stock.path == folder
    assert (ours.execution, stock.execution) == ("auto", "stock")
    assert ours.row.id == "gguf-kernels" and ours.tokens_per_second > 0


def test_where_our_kernels_cannot_run_a_notice_says_why(tiny_run, folder, monkeypatch, caplog):
    monkeypatch.setattr("sqft_export.kernels.llama_plugin.PLUGIN_FILE", Path("/nowhere/plugin.so"))
    onnx = tiny_run["export-onnx"].path / "model"
    with caplog.at_level(logging.WARNING):
        assert usable_execution(folder, "auto") == "stock"
        assert usable_execution(onnx, "dense") == "stock"
        assert usable_execution(folder, "stock") == "stock"
    missing, other = (record.getMessage() for record in caplog.records)
    assert missing == (
        f"{folder}: our kernels are not used: plugin.so is missing; python -m "
        "sqft_export.kernels.build makes it"
    )
    assert other == f"{onnx}: our kernels are not used: onnx has its own kernels"
