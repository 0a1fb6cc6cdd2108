"""`sqft-export compare` and `sweep`: several runs on one page."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT, SMALL, SQFT
from sqft_export.errors import DamagedError, UserError
from sqft_export.report import pictures
from sqft_export.report.runs import compare_runs


@pytest.fixture(scope="module")
def swept(tiny_cli, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """Two sparsities; the first is the run of the fixture, whose passes are cached."""
    runs = tmp_path_factory.mktemp("sweep") / "runs"
    shutil.copytree(tiny_cli.args[-1], runs)  # other tests count what is in theirs
    done = subprocess.run(
        [
            *(SQFT, "sweep", "recipes/tiny.yaml", *SMALL, "benchmark.baselines=[merged]"),
            "export.targets=[openvino, onnx]",
            *("--over", "sparsify.sparsity=0.5,0.7", "--runs", str(runs)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done, runs / "tiny" / "sweep"


def test_a_sweep_compares_every_value(swept):
    done, folder = swept
    document = json.loads((folder / "comparison.json").read_text())
    assert [run["settings"] for run in document["runs"]] == [
        {"sparsify.sparsity": 0.5},
        {"sparsify.sparsity": 0.7},
    ]
    by_name = {row["name"]: row for row in document["rows"]}
    low, high = (by_name[f"sparsity {s}: OpenVINO, packed"] for s in (0.5, 0.7))
    assert high["sparsity"] > 0.69 and high["file_bytes"] < low["file_bytes"]
    assert "| sparsity 0.7: ONNX Runtime, packed" in done.stdout
    assert not document["warnings"]


def test_the_page_needs_nothing_but_itself(swept):
    page = (swept[1] / "index.html").read_text()
    assert page.count("<svg") == 3 and "Settings that differ" in page
    assert "<script" not in page and "<link" not in page and "src=" not in page


def test_the_front_is_what_nothing_beats():
    points = [(2.0, 80.0), (1.0, 70.0), (3.0, 75.0), (1.0, 60.0), (4.0, 90.0)]
    assert pictures.pareto(points) == [(1.0, 70.0), (2.0, 80.0), (4.0, 90.0)]


def test_runs_that_do_not_compare_are_told(tiny_run, tmp_path):
    report = tiny_run["report"].path
    with pytest.raises(UserError, match="found 1 run"):
        compare_runs([report], tmp_path / "out")
    with pytest.raises(UserError, match=r"found no report"):
        compare_runs([report, tmp_path], tmp_path / "out")
    other = tmp_path / "other"
    shutil.copytree(report, other)
    document = json.loads((other / "report.json").read_text())
    (other / "report.json").write_text(json.dumps(document | {"measure": "tokens"}))
    with pytest.raises(DamagedError, match=r"report.json is damaged"):
        compare_runs([report, other], tmp_path / "out")
    (other / "manifest.json").unlink()  # a report alone, from wherever
    with pytest.raises(UserError, match="found measures exact match and tokens"):
        compare_runs([report, other], tmp_path / "out")
    (other / "report.json").write_text(json.dumps(document | {"schema": 1}))
    with pytest.raises(UserError, match=r"schema 1, this version reads \d"):
        compare_runs([report, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("recovery", None),
        ("recovery", "all"),
        ("beside_dense", None),
        ("beside_dense", {"agreement": 0.5, "kl_nats": [0.1]}),
        ("beside_merged", {"agreement": 1.5, "kl_nats": 0.1}),
        ("beside_dense", {"agreement": 1.5, "kl_nats": 0.1}),
        ("accuracy", True),
    ],
)
def test_a_field_that_is_none_is_named(tiny_run, tmp_path, field, value):
    report = tiny_run["report"].path
    other = Path(shutil.copytree(report, tmp_path / "other"))
    (other / "manifest.json").unlink()
    document = json.loads((other / "report.json").read_text())
    document["rows"][-1][field] = value
    (other / "report.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=rf"report.json: rows\.\d+\.{field}"):
        compare_runs([report, other], tmp_path / "page")


def test_another_machine_is_told(tiny_run, tmp_path):
    report = tiny_run["report"].path
    other = tmp_path / "other"
    shutil.copytree(report, other)
    document = json.loads((other / "report.json").read_text())
    document["machine"]["processor"] = "another"
    (other / "manifest.json").unlink()
    (other / "report.json").write_text(json.dumps(document))
    told = compare_runs([report, other], tmp_path / "out")
    assert "different machines" in told.warnings[0]
    assert [run.name for run in told.runs] == ["tiny (1)", "tiny (2)"]


def test_a_bad_value_is_refused_before_the_first_run(tmp_path, sqft_here):
    for over, message in (
        ("sparsify.sparsity=0.5,7", "sparsify.sparsity: found 7"),
        ("sparsify.sparsity", "expected path=value,value"),
    ):
        runs = str(tmp_path / "runs")
        done = sqft_here("sweep", "recipes/tiny.yaml", "--over", over, "--runs", runs)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert not (tmp_path / "runs").exists()


def changed_report(source: Path, folder: Path, **recipe) -> Path:
    """A copy of a report whose recipe has other settings."""
    shutil.copytree(source, folder)
    document = json.loads((folder / "report.json").read_text())
    document["recipe"] |= recipe
    (folder / "manifest.json").unlink()
    (folder / "report.json").write_text(json.dumps(document))
    return folder


def test_runs_of_several_models_are_named_by_them(tiny_run, tmp_path):
    report = tiny_run["report"].path
    model = json.loads((report / "report.json").read_text())["recipe"]["model"]
    folders = [
        changed_report(
            report, tmp_path / name, name=name, model=model | {"path": f"/models/{name}"}, seed=seed
        )
        for seed, name in enumerate(("qwen3", "llama3.2", "granite"))
    ]
    told = compare_runs(folders, tmp_path / "out")
    assert [run.name for run in told.runs] == ["qwen3", "llama3.2", "granite"]
    same_name = [
        changed_report(report, tmp_path / f"own-{m}", model=model | {"path": f"/models/{m}"})
        for m in ("phi", "opt")
    ]
    told = compare_runs(same_name, tmp_path / "out2")
    assert [run.name for run in told.runs] == ["phi", "opt"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<li>qwen3</li>" in page and ">run 3<" in page, "a number in the legend, a key below"


def test_settings_without_effect_on_the_model_are_not_in_the_name(tiny_run, tmp_path):
    report = tiny_run["report"].path
    recipe = json.loads((report / "report.json").read_text())["recipe"]
    other = changed_report(
        report,
        tmp_path / "other",
        sparsify=recipe["sparsify"] | {"sparsity": 0.7},
        export=recipe["export"] | {"targets": ["openvino"]},
        device="cpu",
    )
    told = compare_runs([report, other], tmp_path / "out")
    assert [run.name for run in told.runs] == ["sparsity 0.5", "sparsity 0.7"]
    assert "export.targets" in told.fields, "the page still lists it"
