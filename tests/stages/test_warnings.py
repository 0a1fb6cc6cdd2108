"""Warnings that a reader of the report must see."""

import json
from pathlib import Path

from benchmark_rows import benchmark_row

from conftest import random_model, small_recipe
from sqft_export.measure.results import BenchmarkRow
from sqft_export.run.pipeline import run_recipe
from sqft_export.stages.benchmark import _warnings


def row(id: str, accuracy: float, perplexity: float, **fields) -> BenchmarkRow:
    return benchmark_row(id, accuracy, perplexity=perplexity, **fields)


def test_a_tuning_that_makes_it_worse_is_told():
    start, good = row("sparse-quantized", 0.5, 4.0), row("merged", 0.6, 3.0)
    assert _warnings([start, good], True) == []
    (told,) = _warnings([start, row("merged", 0.6, 592_892.0)], True)
    assert "tuning made the model worse: perplexity of 'merged' is 5.929e+05" in told
    (told,) = _warnings([start, row("merged", 0.3, 3.0)], True)
    assert "accuracy of 'merged' is 0.3, that of 'sparse + INT4' before tuning is 0.5" in told
    (told,) = _warnings([start, row("merged", 0.6, float("nan"))], True)
    assert "perplexity" in told
    assert _warnings([start, row("merged", 0.47, 4.01)], True) == []  # chance
    assert _warnings([start, row("merged", 0.3, 30.0)], False) == []  # nothing was tuned


def test_a_base_that_guesses_is_told():
    (told,) = _warnings([row("dense", 0.0, 77_508.0)], True)
    assert "dense base has a perplexity of 77508" in told


def test_warnings_reach_report_and_console(tmp_path):
    recipe = small_recipe(
        "adapt.learning_rate=10",
        "adapt.warmup_steps=0",
        "adapt.steps=4",
        "benchmark.baselines=[sparse-quantized, merged]",
        "export.targets=[]",
    )
    artifacts = run_recipe(recipe, tmp_path / "runs")
    report = artifacts["report"].path
    warnings = json.loads((report / "report.json").read_text())["warnings"]
    assert any("tuning made the model worse" in warning for warning in warnings)
    assert "tuning made the model worse" in (report / "index.html").read_text()


def test_weights_under_the_smallest_scale_are_told(tmp_path):
    from safetensors.torch import load_file, save_file

    model = random_model(tmp_path / "model")
    file = Path(model) / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("v_proj.weight"):
            tensors[name] *= 2.0**-14
        elif name.endswith("o_proj.weight"):
            tensors[name] *= 2.0**14
    save_file(tensors, file, metadata={"format": "pt"})
    recipe = small_recipe("adapt.ranks=[8, 4]", "adapt.steps=2", model_path=model)
    warnings = run_recipe(recipe, tmp_path / "runs", ("quantize",))["quantize"].metrics["warnings"]
    assert sum("have the smallest scale" in warning for warning in warnings) == 2
    [scales] = [warning for warning in warnings if warning.startswith("scales: ")]
    assert "2 of 14 grids have scales above 100" in scales and len(warnings) == 3
