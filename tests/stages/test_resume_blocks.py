"""A pass that is killed resumes at the first unfinished block and writes the same bytes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, TINY, small_recipe
from sqft_export.artifacts.store import Artifact
from sqft_export.model.block_state import BLOCKS, STATES
from sqft_export.model.tensorfiles import write_tensors
from sqft_export.plan.disk import disk_bytes, state_bytes
from sqft_export.plan.layout import layout_of
from sqft_export.run.pipeline import run_recipe

COMMON = ("adapt=none", "calibration.samples=8", "calibration.sequence_length=48")
PASSES = {
    "sparsify": ("sparsify.method=wanda",),
    "allocation": ("sparsify={method: sparsegpt, sparsity: 0.5, allocation: output-error}",),
    "reconstruct": ("sparsify.reconstruct={steps: 3, batch: 4}",),
    "quantize": (),
    "quantize-reconstruct": ("quantize.reconstruct={steps: 3, batch: 4}",),
}


def digests(artifact: Artifact) -> dict[str, str]:
    return artifact.manifest["files"]


@pytest.mark.parametrize(
    "kind",
    [kind if kind == "quantize" else pytest.param(kind, marks=pytest.mark.slow) for kind in PASSES],
)
def test_a_killed_pass_resumes_with_the_same_bytes(tmp_path, kind):
    """SIGKILL in blocks 1 and 3, while the state after block 2 is written, and before the seal."""
    settings = (*COMMON, *PASSES[kind])
    last = {"allocation": "sparsify"}.get(kind, kind.partition("-")[0])
    whole = run_recipe(small_recipe(*settings), tmp_path / "whole", (last,))
    for name, artifact in whole.items():
        if name != last:
            shutil.copytree(artifact.path, tmp_path / "killed" / artifact.path.name)
    script = ROOT / "tests" / "stages" / "kill_passes.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "killed"), last, *settings],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Each line: number of the run, exit status, numbers of the saved states.
    saved = "4 4" if kind == "allocation" else "4"  # of both walks
    assert done.stdout.splitlines() == [
        *("0 -9 1", "1 -9 2", "2 -9 3", f"3 -9 {saved}", "4 0"),
    ], done.stderr[-3000:]
    resumed = run_recipe(small_recipe(*settings), tmp_path / "killed", (last,))[last]
    assert digests(resumed) == digests(whole[last])
    assert resumed.metrics == whole[last].metrics
    assert not list((tmp_path / "killed").glob("*.partial"))
    assert not (resumed.path / STATES).exists()


def finish_two_blocks(root: Path, monkeypatch) -> Path:
    """Interrupt quantize in its third block; return its folder."""
    from sqft_export.model import blocks

    run_block = blocks._run_block

    def stop_at_the_third(block, *others):
        if block.index == 2:
            raise KeyboardInterrupt
        return run_block(block, *others)

    with monkeypatch.context() as patched:
        patched.setattr(blocks, "_run_block", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(small_recipe(*COMMON, "sparsify.method=none"), root, ("quantize",))
    (partial,) = root.glob("quantize-*.partial")
    return partial


@pytest.mark.parametrize("damaged", ["2-0.safetensors", "2.json", "../../model/model-0"])
def test_a_damaged_state_is_not_used(tmp_path, monkeypatch, damaged):
    recipe = small_recipe(*COMMON, "sparsify.method=none")
    whole = run_recipe(recipe, tmp_path / "whole", ("quantize",))["quantize"]
    monkeypatch.setattr(
        "sqft_export.stages.quantize.MAX_BUFFER_BYTES", 2**18
    )  # so that shards exist
    partial = finish_two_blocks(tmp_path / "runs", monkeypatch)
    monkeypatch.undo()
    file = partial / STATES / BLOCKS / damaged
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = run_recipe(recipe, tmp_path / "runs", ("quantize",))["quantize"]
    assert digests(again) == digests(whole)


def test_another_key_starts_its_own_pass(tmp_path, monkeypatch):
    partial = finish_two_blocks(tmp_path, monkeypatch)
    changed = small_recipe(*COMMON, "sparsify.method=none", "quantize.group_size=32")
    made = run_recipe(changed, tmp_path, ("quantize",))["quantize"]
    assert made.path.name != partial.stem
    assert (partial / STATES / BLOCKS / "2.json").exists()


def test_plan_has_the_disk_of_the_saved_state(tmp_path, monkeypatch):
    recipe = small_recipe(*COMMON, "sparsify.method=none")
    partial = finish_two_blocks(tmp_path, monkeypatch)
    written = sum(file.stat().st_size for file in (partial / STATES / BLOCKS).iterdir())
    layout = layout_of(recipe, TINY)
    assert written <= state_bytes(recipe, layout)["quantize"]
    more = small_recipe(*COMMON, "sparsify.method=none", "calibration.samples=16")
    needed = [disk_bytes(one, layout, tmp_path, ["quantize"])[0] for one in (recipe, more)]
    # Two states of 8 more samples, each with 48 hidden states in float32.
    assert needed[1] - needed[0] == 2 * 8 * 48 * layout.embedding[1] * 4


def test_tensors_are_written_as_safetensors(tmp_path):
    tensors = {
        "half": torch.randn(3, 5).half(),
        "byte": torch.arange(7, dtype=torch.uint8),
        "part": torch.randn(4, 6).T,
        "number": torch.tensor(3),
        "none": torch.empty(0, 4),
    }
    write_tensors(tmp_path / "some.safetensors", tensors)
    found = load_file(tmp_path / "some.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
