"""A model card's code runs as printed, inside the folder of the card."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import sqft_export
from conftest import SQFT, small_recipe
from sqft_export.artifacts.store import files_of, sha256_of
from sqft_export.packed.folders import pack, unpack
from sqft_export.packed.seal import check_seal
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets.inspect import inspect_folder

FENCED = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
DEPLOYMENTS = [
    f"export-{runtime}/{form}"
    for runtime, forms in {
        "openvino": ("model", "packed", "sparse"),
        "onnx": ("model", "packed"),
        "gguf": ("model", "packed"),
    }.items()
    for form in forms
]


def run_block(language: str, code: str, folder: Path) -> str:
    """The output of a code block that runs in a folder."""
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
    path = f"{Path(SQFT).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{folder}\n{code}\n{done.stderr}"
    return done.stdout


def copy_of_deployment(run: dict, name: str, root: Path) -> Path:
    artifact, form = name.split("/")
    return Path(shutil.copytree(run[artifact].path / form, root / form))


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_code_of_a_card_runs_as_printed(tiny_run, name, tmp_path):
    folder = copy_of_deployment(tiny_run, name, tmp_path)
    blocks = FENCED.findall((folder / "README.md").read_text())
    assert blocks, name
    printed = [run_block(language, code, folder) for language, code in blocks]
    assert printed[-1].strip(), "the model answers"
    assert check_seal(folder, whole=True)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_loader_that_inspect_prints_loads_the_folder(tiny_run, name, sqft_here):
    artifact, form = name.split("/")
    folder = tiny_run[artifact].path / form
    found = inspect_folder(folder)
    assert all(entry["installed"] for entry in found["loads_in"])
    printed = sqft_here("inspect", str(folder)).stdout
    for entry in found["loads_in"]:
        assert entry["code"] in printed
    names = ", ".join(["sqft_export", *(entry["runtime"] for entry in found["loads_in"])])
    codes = "\n".join(entry["code"] for entry in found["loads_in"])
    run_block("python", f"import {names}\n{codes}", folder)


@pytest.mark.parametrize("name", [name for name in DEPLOYMENTS if "packed" in name])
def test_packed_weights_are_counted_as_weights(tiny_run, name):
    artifact, form = name.split("/")
    folder = tiny_run[artifact].path / form
    (weights,) = folder.glob("*.sqft")
    assert inspect_folder(folder)["bytes"]["weights"] == weights.stat().st_size


def test_a_folder_without_a_genai_config_does_not_load_in_genai(tiny_run, tmp_path):
    folder = copy_of_deployment(tiny_run, "export-onnx/model", tmp_path)
    for name in ("genai_config.json", "provenance.json"):
        (folder / name).unlink()
    assert [entry["runtime"] for entry in inspect_folder(folder)["loads_in"]] == ["onnxruntime"]


def test_a_card_has_the_prompt_that_was_trained(tiny_run):
    for name in DEPLOYMENTS:
        artifact, form = name.split("/")
        card = (tiny_run[artifact].path / form / "README.md").read_text()
        assert '| prompt | `"Question: {question}\\nAnswer:"` |' in card, name
        assert 'prompt = "Question: ' in card, name


def test_a_copy_that_is_packed_by_hand_says_how_it_loads_and_comes_back_byte_for_byte(
    tiny_run, tmp_path
):
    dense = copy_of_deployment(tiny_run, "export-onnx/model", tmp_path)
    pack(dense, tmp_path / "by hand")
    assert "sqft_export.load_onnx_genai" in (tmp_path / "by hand" / "README.md").read_text()
    assert check_seal(tmp_path / "by hand", whole=True)
    unpack(tmp_path / "by hand", tmp_path / "back")
    back = {f.name: sha256_of(f) for f in files_of(tmp_path / "back")}
    assert back == {f.name: sha256_of(f) for f in files_of(dense)}


def test_a_card_that_is_not_as_it_was_sealed_stays_so(tiny_run, tmp_path):
    dense = copy_of_deployment(tiny_run, "export-onnx/model", tmp_path)
    with (dense / "README.md").open("a") as card:
        card.write("added")
    pack(dense, tmp_path / "by hand")
    assert (tmp_path / "by hand" / "README.md").read_bytes() == (dense / "README.md").read_bytes()
    with pytest.raises(sqft_export.packed.seal.DamagedError, match=r"README.md: is not the file"):
        check_seal(tmp_path / "by hand", whole=True)


def test_the_card_of_a_merged_gptq_folder_names_what_reads_it(tiny_run, tmp_path):
    folder = Path(shutil.copytree(tiny_run["merge"].path / "model", tmp_path / "model"))
    (shell, install), (python, code) = FENCED.findall((folder / "README.md").read_text())
    assert (shell, install.split()[:2], python) == ("sh", ["pip", "install"], "python")
    assert "gptqmodel" in install.split()
    if find_spec("gptqmodel") is None:  # then as far as the installed packages go
        lines = code.splitlines(keepends=True)
        code = "".join(line for line in lines if "model" not in line.partition("=")[0])
        code = "".join(line for line in code.splitlines(keepends=True) if "generate" not in line)
        code += "print(batch['input_ids'].shape)"
    assert run_block("python", code, folder).strip()


def test_the_card_of_a_merged_float_folder_runs_in_transformers(tmp_path):
    overrides = ("quantize.method=none", "adapt=none", "export.targets=[openvino]")
    recipe = small_recipe(*overrides, "export.sparse_files=false", "export.sparse_execution=false")
    merged = run_recipe(recipe, tmp_path, ("merge",))["merge"].path / "model"
    ((language, code),) = FENCED.findall((merged / "README.md").read_text())
    assert "gptqmodel" not in (merged / "README.md").read_text()
    assert run_block(language, code, merged).strip()


def test_an_unmerged_adapter_is_applied_by_the_code_of_the_cards(tmp_path):
    overrides = ("adapt.pipeline=sqft", "adapt.steps=2", "export.targets=[openvino, onnx]")
    recipe = small_recipe(*overrides)
    run = run_recipe(recipe, tmp_path / "runs", ("export-openvino", "export-onnx"))
    for name in [n for n in DEPLOYMENTS if "gguf" not in n]:
        if not (run[name.split("/")[0]].path / name.split("/")[1]).is_dir():
            continue
        folder = copy_of_deployment(run, name, tmp_path / name.split("/")[0])
        card = (folder / "README.md").read_text()
        assert "dapters" in card
        for language, code in FENCED.findall(card):
            assert run_block(language, code, folder).strip(), json.dumps([name, code])
