"""`inspect` reports the true contents of a deployment."""

import json
import subprocess

import pytest

from conftest import ROOT, SMALL, SQFT
from sqft_export.artifacts.store import sha256_of
from sqft_export.errors import UserError
from sqft_export.targets.inspect import inspect_folder


@pytest.mark.parametrize("runtime", ["openvino", "onnx", "gguf"])
def test_a_deployment_says_what_it_holds(tiny_run, runtime):
    folder = tiny_run[f"export-{runtime}"].path / "model"
    found = inspect_folder(folder)
    assert found["runtime"] == runtime
    assert found["says"]["bits"] == "4" and found["says"]["model_type"] == "mistral"
    merged = tiny_run["merge"].metrics["sparsity"]
    assert float(found["says"]["sparsity"]) == pytest.approx(merged["all"], abs=1e-6)
    assert len(found["layers"]) == 28
    assert found["layers"][0]["layer"] < found["layers"][-1]["layer"]
    for layer in found["layers"]:
        assert layer["sparsity"] == pytest.approx(merged[layer["layer"]])
        assert (layer["bits"], layer["group_size"], layer["symmetric"]) == (4, 64, True)
    for name, digest in found["files"].items():
        assert sha256_of(folder / name) == digest
    assert sum(found["bytes"].values()) == sum(
        f.stat().st_size for f in folder.rglob("*") if f.is_file()
    )
    assert all(entry["installed"] for entry in found["loads_in"])


def test_both_runtimes_are_made_from_the_same_weights(tiny_run):
    digests = {
        inspect_folder(tiny_run[f"export-{name}"].path / "model")["says"]["weights_sha256"]
        for name in ("openvino", "onnx")
    }
    assert len(digests) == 1


def test_a_folder_that_is_no_deployment_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"found no graph, expected one of openvino_model.xml"):
        inspect_folder(tmp_path)


def test_exporting_again_trains_nothing_again(tiny_run):
    root = tiny_run["merge"].path.parent
    done = subprocess.run(
        [SQFT, "export", "recipes/tiny.yaml", *SMALL, "--only", "onnx", "--runs", str(root.parent)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(tiny_run["export-onnx"].path / "model")
    lines = [line.split() for line in done.stderr.splitlines() if line.endswith("cached")]
    assert {state for _, state in lines} == {"cached"}
    assert not {"verify", "export-openvino", "benchmark"} & {name for name, _ in lines}


def test_the_command_prints_a_table_and_json(tiny_run):
    folder = str(tiny_run["export-onnx"].path / "model")
    text, document = (
        subprocess.run(
            [SQFT, "inspect", folder, *flags], capture_output=True, text=True, check=True
        )
        for flags in ((), ("--json",))
    )
    assert "model.layers.3.mlp.down_proj" in text.stdout
    assert json.loads(document.stdout) == inspect_folder(tiny_run["export-onnx"].path / "model")
