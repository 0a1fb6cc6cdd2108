"""Two processes on one machine train the same weights as one process with twice the batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, SMALL, random_model

SETTINGS = (
    "adapt.ranks=[8, 4]",
    "adapt.steps=6",
    "adapt.learning_rate=1e-2",
    "export.targets=[]",
    "benchmark.baselines=[merged]",
    "task.max_new_tokens=2",
)


def run(launcher: list[str], runs: Path, model: Path, batch: int) -> tuple[list[dict], str]:
    """Training log and stdout of the embedded recipe on another model."""
    command = [*launcher, "-m", "sqft_export.cli", "run", "recipes/tiny.yaml"]
    settings = [*SMALL, *SETTINGS, f"adapt.batch={batch}"]
    options = ["--model-path", str(model), "--runs", str(runs)]
    done = subprocess.run(
        [*command, *settings, *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = runs.glob("tiny/adapt-*/training.jsonl")
    assert not list(runs.glob("tiny/*.partial"))
    return [json.loads(line) for line in log.read_text().splitlines()], done.stdout


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    model = random_model(tmp_path / "model")
    torchrun = str(Path(sys.executable).parent / "torchrun")
    two = [torchrun, "--standalone", "--nproc_per_node", "2"]
    one, _ = run([sys.executable], tmp_path / "one", model, batch=8)
    both, out = run(two, tmp_path / "two", model, batch=4)
    assert [step["ranks"] for step in one] == [step["ranks"] for step in both]
    for ours, theirs in zip(one, both, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    # One process writes and speaks.
    assert sum(line.startswith("{") for line in out.splitlines()) == 1


@pytest.mark.slow
def test_fsdp_spreads_the_weights_and_changes_no_gradient(tmp_path):
    """Base weights half on either process, gathered in forward and again in backward."""
    model = random_model(tmp_path / "model", intermediate_size=128, dtype="bfloat16")
    torchrun = str(Path(sys.executable).parent / "torchrun")
    script = [str(ROOT / "tests" / "run" / "fsdp_step.py"), str(model), str(tmp_path / "adapter")]
    done = subprocess.run(
        [torchrun, "--standalone", "--nproc_per_node", "2", *script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    gathered, whole = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "whole")
    )
    assert gathered.keys() == whole.keys() and gathered
    for name, tensor in whole.items():
        torch.testing.assert_close(gathered[name], tensor)
