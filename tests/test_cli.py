import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sqft_export.errors import UserError
from sqft_export.plan.checks import check_recipe
from sqft_export.recipe.load import load_recipe
from sqft_export.run.pipeline import run_recipe

ROOT = Path(__file__).parent.parent
SQFT = str(Path(sys.executable).parent / "sqft-export")


def sqft(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(
        [SQFT, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_help_imports_neither_torch_nor_a_runtime():
    code = (
        "import sys\nfrom sqft_export import cli\n"
        "heavy = {'torch', 'transformers', 'openvino', 'onnxruntime', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "run" in sqft("--help").stdout


@pytest.mark.parametrize("task", ["gsm8k", "math", "commonsense"])
@pytest.mark.parametrize(
    "name",
    [
        *("mistral", "llama3", "llama3.2-1b", "phi3", "qwen2.5", "opt", "bloom", "smollm2"),
        *("gemma4-e2b", "lfm2-1.2b", "qwen3.5-0.8b"),
    ],
)
def test_every_recipe_plans_every_task(name, task, tmp_path):
    """By make, as users type it; no weights and no network are needed."""
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "plan", f"MODEL={name}", f"TASK={task}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    settings = shlex.split(done.stdout.splitlines()[-1])[3:]
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", tuple(settings))
    assert recipe.name == name
    assert recipe.task.name == {"math": "math_10k"}.get(task, task)
    if task == "gsm8k":  # its data is in this repository
        check_recipe(recipe, None)


def test_an_unknown_task_is_told():
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "plan", "MODEL=phi3", "TASK=maths"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode and "allowed are gsm8k, math, commonsense" in done.stderr


@pytest.mark.parametrize("name", ["tiny", "mistral"])
def test_recipes_pass_plan(name, tmp_path, sqft_here):
    done = sqft_here("plan", f"recipes/{name}.yaml", "--runs", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [p["pass"] for p in document["passes"]][:5] == [
        "sparsify",
        "quantize",
        "adapt",
        "search",
        "merge",
    ]
    assert document["disk"]["needed_bytes"] > 0
    assert not any(tmp_path.iterdir())
    if name == "mistral":
        predicted = {p["pass"]: p["predicted_bytes"] for p in document["passes"]}
        # 14.5 GB of float16 and one mask bit a weight; 4.2 GB in INT4 and the mask.
        assert 15.0e9 < predicted["sparsify"] < 15.6e9
        assert 4.8e9 < predicted["merge"] < 5.2e9


def refused(root: Path, *overrides: str) -> str:
    """The message of a recipe that is refused."""
    with pytest.raises(UserError) as caught:
        run_recipe(load_recipe(ROOT / "recipes" / "tiny.yaml", overrides), root)
    return str(caught.value)


def test_what_does_not_fit_the_model_is_refused_before_any_work(tmp_path, sqft_here):
    def faults(*overrides: str) -> str:
        done = sqft_here("run", "recipes/tiny.yaml", *overrides, "--runs", str(tmp_path))
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        return done.stderr

    assert "adapt.ranks: found 128, but k_proj has only 64" in faults("adapt.ranks=[128]")
    assert "allowed are down_proj, gate_proj, k_proj" in refused(
        tmp_path, "adapt.target_modules=[q_proj,k_proj,v_proj,out]"
    )
    assert "task.train: no such file" in refused(tmp_path, "task.train=nope.jsonl")
    assert "the template needs query; the item has question, answer" in refused(
        tmp_path, "task.prompt='{query}'"
    )
    assert "no Hugging Face model in /nowhere" in faults("model.path=/nowhere")
    assert not any(tmp_path.iterdir())


def test_a_hub_that_is_out_of_reach_is_one_sentence_with_two_ways_out(tmp_path, sqft_here):
    hub = "model={hub: nobody/nothing}"
    done = sqft_here("run", "recipes/tiny.yaml", hub, "--runs", str(tmp_path))
    assert done.returncode == 2
    assert "can't be downloaded" in done.stderr
    assert "MODEL_PATH=<folder>" in done.stderr
    assert "make recipe" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_mixture_of_experts_is_refused_by_name_before_any_work(tmp_path, sqft_here):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_moe"}')
    done = sqft_here("run", "recipes/tiny.yaml", "--model-path", str(tmp_path))
    assert done.returncode == 2
    assert "model_type: qwen2_moe is a mixture of experts" in done.stderr
