"""`sqft-export verify`: every digest and line again, of what is there now."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT, SQFT, copy_run


def verify(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [SQFT, "verify", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_finished_run_is_certified_again_from_its_files_alone(tiny_run):
    root = tiny_run["merge"].path.parent
    before = sorted(root.rglob("*"))
    done = verify(root, "--json")
    assert done.returncode == 0, done.stderr
    again = [check for part in json.loads(done.stdout).values() for check in part]
    first = tiny_run["verify"].metrics["checks"]
    keys = ("name", "part", "unit", "compared", "passed")
    said = [sorted([c[k] for k in keys] for c in checks) for checks in (again, first)]
    assert said[0] == said[1]
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(
    "stage", ["sparsify", "quantize", "search", "merge", "export-openvino", "export-onnx", "verify"]
)
def test_one_flipped_bit_anywhere_is_named(tiny_run, tmp_path, stage):
    root = copy_run(tiny_run, tmp_path)
    folder = root / tiny_run[stage].path.name
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json"]
    damaged = max(files, key=lambda file: file.stat().st_size)
    text = bytearray(damaged.read_bytes())
    text[len(text) // 2] ^= 1
    damaged.write_bytes(text)
    done = verify(root)
    assert done.returncode == 4, done.stderr
    assert damaged.name in done.stderr and "damaged" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("runtime", ["openvino", "onnx", "gguf"])
def test_a_deployment_is_held_to_its_seal(tiny_run, tmp_path, runtime):
    folder = tmp_path / "deployed"
    source = tiny_run[f"export-{runtime}"].path / "model"
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    assert verify(folder).returncode == 0
    largest = max(folder.iterdir(), key=lambda file: file.stat().st_size)
    text = bytearray(largest.read_bytes())
    text[-1] ^= 1
    largest.write_bytes(text)
    done = verify(folder)
    assert done.returncode == 4 and largest.name in done.stderr


def test_a_folder_that_is_neither_is_refused(tmp_path):
    done = verify(tmp_path)
    assert done.returncode == 2
    assert "is neither a deployment nor a run" in done.stderr
