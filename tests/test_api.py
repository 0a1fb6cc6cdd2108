"""The Python interface."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sqft_export
from conftest import ROOT
from sqft_export.errors import UserError


def test_importing_the_package_loads_no_torch_and_no_runtime():
    code = (
        "import sys, sqft_export\n"
        "heavy = {'torch', 'transformers', 'openvino', 'onnxruntime', 'onnx', 'pandas'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert callable(sqft_export.plan) and callable(sqft_export.compile)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_is_typed_and_has_its_version():
    from importlib.metadata import version

    assert (Path(sqft_export.__file__).parent / "py.typed").is_file()
    assert sqft_export.__version__ == version("sqft-export")


# In a process without a terminal, as in a notebook; the run's passes are cached.
COMPILE = """
import json, os, sys
import sqft_export

streams = [os.fstat(number).st_ino for number in (1, 2)] + [id(sys.stdout), id(sys.stderr)]
seen = []
run = sqft_export.compile(
    "builtin:tiny",
    data="chats.jsonl",
    on_progress=seen.append,
    adapt={"epochs": 1},
    benchmark={"items": 2, "repeats": 2, "new_tokens": 4},
    verify={"prompts": 2},
)
now = [os.fstat(number).st_ino for number in (1, 2)] + [id(sys.stdout), id(sys.stderr)]
assert now == streams
assert callable(sqft_export.plan)
best = run.report.best
print(json.dumps({
    "passes": [[one.name, one.done, one.total] for one in seen],
    "best": [best.name, best.tokens_per_second, best.accuracy],
    "passed": run.certificate.passed,
    "deployments": {name: str(one.path) for name, one in run.deployments.items()},
    "plan": [step.cached for step in run.plan.passes],
    "text": str(run.plan),
}))
"""


def test_compile_returns_the_run_with_report_certificate_deployments_and_plan(own_run):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=own_run.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # progress goes to on_progress only
    found = json.loads(done.stdout)
    assert [name for name, done, total in found["passes"] if done == total][-1] == "report"
    assert found["passed"] and all(found["plan"])
    assert set(found["deployments"]) >= {"openvino", "onnx", "gguf"}
    assert all((own_run.folder / path).is_dir() for path in found["deployments"].values())
    report = json.loads(next(own_run.root.glob("report-*/report.json")).read_text())
    (row,) = (row for row in report["rows"] if row["name"] == found["best"][0])
    assert found["best"][1] == pytest.approx(1000 / row["tpot"]["median_ms"])
    assert "report" in found["text"] and "cached" in found["text"]


def test_a_finished_run_is_opened_by_its_folder(own_run):
    run = sqft_export.open_run(own_run.root)
    assert run.certificate.passed
    assert run.page.is_file()
    assert {row.name for row in run.report.rows} >= {"dense base", "llama.cpp"}
    with pytest.raises(LookupError, match="without its recipe"):
        _ = run.plan


def test_plan_takes_a_recipe_file_a_mapping_or_a_model(own_run, tmp_path):
    file = ROOT / "recipes" / "tiny.yaml"
    of_file = sqft_export.plan(recipe=file, out=tmp_path, seed=7)
    assert of_file.document.recipe == "tiny"
    from ruamel.yaml import YAML

    mapping = YAML(typ="safe").load(file)
    of_mapping = sqft_export.plan(recipe=mapping, out=tmp_path, seed=7)
    keys = [[step.key for step in one.passes] for one in (of_file, of_mapping)]
    assert keys[0] == keys[1]
    data = own_run.folder / "chats.jsonl"
    of_model = sqft_export.plan("builtin:tiny", data, preset="int4-untuned", out=tmp_path)
    assert "adapt" not in [step.name for step in of_model.passes]
    assert of_model.seconds > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give model and data"),
        ({"model": "builtin:tiny"}, "give model and data"),
        ({"recipe": {"name": "x"}, "data": "y"}, "data goes with a model"),
        ({"recipe": {"name": "x"}}, "recipe: model: is missing"),
        ({"recipe": "nowhere.yaml"}, "no such recipe"),
        ({"model": "builtin:tiny", "data": __file__, "preset": "x"}, "preset: found 'x'"),
    ],
)
def test_a_mistake_is_an_error_of_the_package(arguments, message):
    with pytest.raises(UserError, match=message):
        sqft_export.compile(**arguments)


def test_settings_are_those_of_the_command_line():
    from sqft_export.api import _settings_text

    settings = {"adapt": {"epochs": 1, "ranks": [8, 4]}, "seed": 3, "calibration": {"field": "a b"}}
    assert list(_settings_text("", settings)) == [
        "adapt.epochs=1",
        "adapt.ranks=[8, 4]",
        "seed=3",
        'calibration.field="a b"',
    ]


def test_benchmark_measures_deployments(own_run):
    folders = [next(own_run.root.glob(f"export-{name}-*/model")) for name in ("onnx", "gguf")]
    quick = {"rounds": 1, "prompt_tokens": (8,), "new_tokens": 2, "batches": (1,)}
    found = sqft_export.benchmark(folders, data=ROOT / "README.md", items=2, **quick)
    assert len(found.folders) == 2 and len(found.accuracy) == 2
    with pytest.raises(UserError, match="settings are prompt_tokens"):
        sqft_export.benchmark(folders, speed=1)
