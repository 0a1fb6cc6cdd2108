"""Passes on several processes give the bytes of one process, and stop together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, random_model, small_recipe
from sqft_export.errors import UserError
from sqft_export.machine.launcher import check_launcher
from sqft_export.run.pipeline import run_recipe

TORCHRUN = str(Path(sys.executable).parent / "torchrun")
WORKER = """
import os
import signal
import sys
from pathlib import Path
from conftest import small_recipe
from sqft_export.errors import UserError
from sqft_export.machine.launcher import process_rank
from sqft_export.model import blocks
from sqft_export.run.pipeline import run_recipe
run_block = blocks._run_block

def run_or_die(block, *others):
    if str(block.index) == os.environ.get("KILLED_BLOCK") and process_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return run_block(block, *others)

blocks._run_block = run_or_die
model = None if sys.argv[2] == "-" else Path(sys.argv[2])
try:
    recipe = small_recipe(*sys.argv[4:], model_path=model)
    run_recipe(recipe, Path(sys.argv[1]), (sys.argv[3],))
except UserError as error:
    print(f"rank {process_rank()}: {error}", flush=True)
    sys.exit(error.code)
"""
SETTINGS = ("adapt=none", "calibration.samples=6", "calibration.sequence_length=48")


def run_on(
    count: int,
    root: Path,
    last: str,
    *settings: str,
    model: Path | None = None,
    killed_block: str = "",
) -> subprocess.CompletedProcess:
    """Run the passes up to ``last`` in several processes; SIGKILL ends one of them in a block."""
    script = root.parent / "worker.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(WORKER)
    return subprocess.run(
        [
            *(TORCHRUN, "--standalone", f"--nproc-per-node={count}", str(script)),
            *(str(root), str(model or "-"), last, *SETTINGS, *settings),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "KILLED_BLOCK": killed_block,
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (2, ("sparsify.method=wanda",)),
        pytest.param(4, ("sparsify.method=wanda",), marks=pytest.mark.slow),
        pytest.param(
            4,
            ("sparsify={method: sparsegpt, sparsity: 0.5, allocation: output-error}",),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_codes_do_not_depend_on_the_number_of_processes(tmp_path, count, settings):
    """Wanda's norms, SparseGPT's and GPTQ's Hessians; 6 samples on 4 processes are uneven."""
    one = run_recipe(small_recipe(*SETTINGS, *settings), tmp_path / "one", ("quantize",))
    done = run_on(count, tmp_path / "several", "quantize", *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    several = run_recipe(small_recipe(*SETTINGS, *settings), tmp_path / "several", ("quantize",))
    for name, artifact in one.items():
        assert several[name].manifest["files"] == artifact.manifest["files"], name
        assert several[name].metrics == artifact.metrics


@pytest.mark.slow
def test_one_process_resumes_what_two_have_begun(tmp_path):
    """One of two processes is killed in the third block; a single process goes on from there."""
    recipe = small_recipe(*SETTINGS, "sparsify.method=wanda")
    whole = run_recipe(recipe, tmp_path / "whole", ("sparsify",))["sparsify"]
    root = tmp_path / "several"
    done = run_on(2, root, "sparsify", "sparsify.method=wanda", killed_block="2")
    assert done.returncode != 0
    (states,) = root.glob("sparsify-*.partial/states/blocks")
    assert {file.name for file in states.glob("2*")} >= {
        *("2.json", "2-0.safetensors", "2-1.safetensors"),
    }
    resumed = run_recipe(recipe, root, ("sparsify",))["sparsify"]
    assert resumed.manifest["files"] == whole.manifest["files"]
    assert resumed.metrics == whole.metrics


def test_all_processes_stop_with_the_first_error(tmp_path):
    """Inputs that overflow on one process's samples only stop both, with its message."""
    import torch
    from safetensors.torch import load_file, save_file

    model = random_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = torch.full_like(weights[name], 3e38)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    done = run_on(2, tmp_path / "runs", "sparsify", "sparsify.method=wanda", model=model)
    lines = [line for line in done.stdout.splitlines() if line.startswith("rank ")]
    assert done.returncode != 0
    assert lines and all("NaN or infinite" in line for line in lines), done.stderr[-2000:]


def test_the_first_version_of_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for version in ("1", None):
        if version is None:
            monkeypatch.delenv("FSDP_VERSION")
        else:
            monkeypatch.setenv("FSDP_VERSION", version)
        with pytest.raises(UserError, match=r"FSDP_VERSION: found 1; .*--fsdp_version 2"):
            check_launcher()
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_launcher()
