"""`run`, `plan` and `init` with a model and data in place of a recipe."""

import json
import subprocess
from pathlib import Path

import pytest

from conftest import SHORT, SQFT
from sqft_export.inference.locate import deployments_of_run
from sqft_export.inference.templates import read_chat_template


def sqft(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([SQFT, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def refused(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr


def test_one_command_compiles_a_model_on_conversations(own_run):
    document = json.loads(own_run.done.stdout.splitlines()[-1])
    assert document["recipe"]["task"]["kind"] == "chat"
    assert all(check["passed"] for check in document["verify"])
    names = {row["name"] for row in document["rows"]}
    assert {"dense base", "OpenVINO", "ONNX Runtime", "llama.cpp"} <= names
    stored = (own_run.root / "recipe.yaml").read_text()
    assert "What" not in stored and "# share" not in stored
    assert stored.startswith("# run with these settings too: adapt.epochs=1")


def test_init_writes_a_recipe_with_the_same_keys(own_run):
    """So `run` of that file finds every pass of the command without a recipe."""
    done = sqft("init", "builtin:tiny", "--data", "chats.jsonl", cwd=own_run.folder)
    assert done.returncode == 0, done.stderr
    text = (own_run.folder / "tiny.yaml").read_text()
    fields = [line for line in text.splitlines() if line.startswith("  ") and "# " not in line]
    comments = [line for line in text.splitlines() if line.startswith("  # ")]
    assert len(comments) >= len(fields)
    planned = sqft("plan", "tiny.yaml", *SHORT, "--json", cwd=own_run.folder)
    assert planned.returncode == 0, planned.stderr
    assert all(step["cached"] for step in json.loads(planned.stdout)["passes"])
    again = refused(sqft("init", "builtin:tiny", "--data", "chats.jsonl", cwd=own_run.folder))
    assert "tiny.yaml: exists already" in again


def test_options_are_settings(own_run):
    options = ("--preset", "int8", "--target", "onnx", "--sparsity", "0.25", "--device", "cpu")
    done = sqft(
        *("plan", "builtin:tiny", "--data", "chats.jsonl", *options, "--json"), cwd=own_run.folder
    )
    assert done.returncode == 0, done.stderr
    passes = [step["pass"] for step in json.loads(done.stdout)["passes"]]
    assert passes[:2] == ["sparsify", "quantize"]
    assert [name for name in passes if name.startswith("export")] == ["export-onnx"]
    odd = ("--data", "chats.jsonl", "--bits", "5")
    assert "quantize.bits: found 5" in refused(
        sqft("plan", "builtin:tiny", *odd, cwd=own_run.folder)
    )


def test_a_recipe_and_data_are_not_mixed(sqft_here, tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    done = sqft_here("run", "mine.yaml", "--data", "x.jsonl", "--preset", "int8", cwd=tmp_path)
    assert "--data, --preset: found with the recipe mine.yaml" in refused(done)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "tinny"), "no such recipe and no such model"),
        (("run", "chats.jsonl"), "is a data file; name the model too"),
        (("run", "builtin:tiny"), "--data is missing"),
        (("run", "builtin:tiny", "--data", "nowhere.jsonl"), "nowhere.jsonl: no such data"),
        (("run", "builtin:tiny", "--data", "chats.jsonl", "--preset", "int5"), "preset: found"),
        (("run", "owner/name", "--data", "chats.jsonl"), "can't be downloaded"),
        (("run", ".", "--data", "chats.jsonl"), "not a Hugging Face model folder"),
        (("run", "odd name", "--data", "chats.jsonl"), "neither a model folder nor a name"),
        (("run", "builtin:tiny", "--data", "odd.csv"), "found the columns a, b"),
        (("init", "recipe.yaml", "--data", "chats.jsonl"), "init takes a model"),
    ],
)
def test_a_first_mistake_is_one_message_that_helps(own_run, sqft_here, arguments, message):
    (own_run.folder / "odd.csv").write_text("a,b\n1,2\n")
    (own_run.folder / "recipe.yaml").write_text("name: x\n")
    runs = () if "init" in arguments else ("--runs", "elsewhere")
    error = refused(sqft_here(*arguments, *runs, cwd=own_run.folder))
    assert message in error
    assert not (own_run.folder / "elsewhere").exists()


def test_every_deployment_carries_the_template_that_was_trained(own_run):
    """Those of dense LoRA that was quantized afterwards too: one of them may be recommended."""
    found = deployments_of_run(own_run.root)
    assert any(one.row.kind == "peer" for one in found)
    for one in found:
        assert read_chat_template(one.path) is not None, one.name


def test_chat_uses_the_template_that_was_trained(own_run):
    done = sqft("chat", "runs/tiny", "-p", "What is 2 plus 3?", cwd=own_run.folder)
    assert done.returncode == 0, done.stderr
    assert "best deployment of runs/tiny" in done.stderr
    assert "no chat template" not in done.stderr
    told = sqft(
        *("chat", "runs/tiny", "-p", "What is 2 plus 3?", "--system", "Be short."),
        cwd=own_run.folder,
    )
    assert told.returncode == 0, told.stderr
