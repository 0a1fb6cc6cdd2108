"""Passes on several processes give the bytes of one process, and stop together."""

import json
import os
import socket
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
from sqft_export.run import pipeline
run_block, run_recipe = blocks._run_block, pipeline.run_recipe
if process_rank():  # the first process decides
    pipeline.plan_passes = pipeline.resolve_precision = pipeline.pin_revisions = None

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
    """One of two processes is killed in the third block; a single process resumes there."""
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


START_WORKER = """
import sys
from pathlib import Path
import torch
from conftest import small_recipe
from sqft_export.errors import HostError, UserError
from sqft_export.machine.launcher import process_rank
from sqft_export.run import pipeline
recipe, prepare = small_recipe("adapt=none", "calibration.samples=4"), pipeline.prepare_recipe

def lacks_disk(*arguments):
    raise HostError("disk: 9 GiB needed, 1 GiB free")

def other_device(setting):
    return torch.device("cuda")

if str(process_rank()) == sys.argv[2]:
    pipeline.prepare_recipe = lacks_disk
if process_rank() == 1 and sys.argv[2] == "device":
    pipeline.device_of = other_device
try:
    pipeline.run_recipe(recipe, Path(sys.argv[1]), ("sparsify",))
except UserError as error:
    print(error, flush=True)
    sys.exit(error.code)
"""


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("0", "disk: 9 GiB needed, 1 GiB free"),
        ("1", "disk: 9 GiB needed, 1 GiB free"),
        ("device", "device: process 1 found cuda, process 0 has cpu; set device=cpu"),
    ],
)
def test_a_failure_before_the_passes_ends_all_processes_with_its_exit_code(
    tmp_path, failing, message
):
    """No launcher that could end the other process: it gets the error itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", START_WORKER, str(tmp_path / "runs"), failing],
            cwd=ROOT,
            env={
                **os.environ,
                **launched,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [3, 3], outputs
    source = int(failing == "1" or failing == "device")
    assert outputs[source][0].startswith(message), outputs
    assert outputs[1 - source][0].startswith(f"process {source}: {message}"), outputs


@pytest.mark.slow
def test_scores_of_torch_rows_do_not_depend_on_the_number_of_processes(tmp_path):
    """Both processes have the model and share the batches; one of them times it."""
    settings = (
        *("sparsify.method=wanda", "export.targets=[]", "benchmark.items=9", "verify.prompts=2"),
        *("benchmark.baselines=[dense, merged]", "benchmark.repeats=2", "benchmark.rounds=2"),
        "benchmark.new_tokens=2",
    )
    recipe = small_recipe(*SETTINGS, *settings)
    one = run_recipe(recipe, tmp_path / "one", ("benchmark",))["benchmark"]
    done = run_on(2, tmp_path / "several", "benchmark", *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    two = run_recipe(recipe, tmp_path / "several", ("benchmark",))["benchmark"]
    answers = [(found.path / "items.jsonl").read_text() for found in (one, two)]
    assert answers[0] == answers[1] and answers[0].count("\n") == 18
    figures = [
        [
            {name: row[name] for name in ("id", "accuracy", "perplexity", "token_accuracy")}
            for row in json.loads((found.path / "results.json").read_text())["rows"]
        ]
        for found in (one, two)
    ]
    assert figures[0] == figures[1]
    assert set(two.manifest["files"]) == set(one.manifest["files"])


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
