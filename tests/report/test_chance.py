"""A dense base that guesses is no measure: the report says that it knows nothing about the task."""

import json

import pytest
from benchmark_rows import benchmark_row

from conftest import random_model, small_recipe
from sqft_export.data.items import Item
from sqft_export.measure.chance import chance_accuracy, is_at_chance
from sqft_export.measure.statistics import wilson
from sqft_export.report.verdict import verdict
from sqft_export.run.pipeline import run_recipe


def item(choices: int, source: str = "") -> Item:
    pairs = tuple(([1], [2 + n]) for n in range(choices))
    scoring = "choice" if choices else "exact"
    return Item([1], [2], "a", source, scoring, pairs)


def test_chance_is_one_over_the_choices_and_zero_for_generated_answers():
    assert chance_accuracy([item(4), item(4)]) == 0.25
    assert chance_accuracy([item(4), item(5)]) == pytest.approx(0.225)
    assert chance_accuracy([item(0)]) == 0
    assert chance_accuracy([item(2, "boolq"), *[item(4, "arc")] * 3]) == pytest.approx(0.375)
    assert chance_accuracy([Item([1], [2], None)]) is None


@pytest.mark.parametrize(
    ("right", "count", "chance", "expected"),
    [
        (26, 100, 0.25, True),
        (33, 100, 0.25, True),
        (40, 100, 0.25, False),
        (0, 100, 0.0, True),
        (1, 100, 0.0, False),
        (55, 100, 0.5, True),
        (65, 100, 0.5, False),
    ],
)
def test_at_chance_is_not_significantly_above_it(right, count, chance, expected):
    interval = wilson(right, count)
    row = benchmark_row("dense", right / count, interval=interval, chance=chance)
    assert is_at_chance(row) == expected


@pytest.mark.parametrize(("perplexity", "expected"), [(40.0, False), (5_000.0, True)])
def test_plain_text_is_judged_by_its_perplexity(perplexity, expected):
    row = benchmark_row("dense", interval=None, chance=None, perplexity=perplexity)
    assert is_at_chance(row) == expected


def test_the_verdict_says_so_and_gives_no_share_of_dense():
    dense = benchmark_row("dense", 0.25, chance=0.25, at_chance=True)
    made = benchmark_row("openvino", 0.5, p_same_as_first=0.01)
    said = verdict([dense, made], "answered right")
    assert said.endswith(
        "Accuracy: 50.0 % (45.0 to 55.0) answered right; the dense base knows nothing about this "
        "task: its 25.0 % (20.0 to 30.0) is not significantly above chance, 25.0 %."
    )
    assert "points" not in said
    made = benchmark_row("openvino", 0.5, p_same_as_lora=0.01)
    said = verdict([dense, benchmark_row("dense-lora", 0.6), made], "answered right")
    assert "10.0 points below dense + LoRA's 60.0 %" in said
    assert said.endswith("is not significantly above chance, 25.0 %.")


def test_a_report_of_a_model_that_knows_nothing(tmp_path):
    """Random weights answer none of the word problems: no row has a share of dense."""
    settings = ("adapt=none", "benchmark.baselines=[dense, merged]", "export.targets=[openvino]")
    recipe = small_recipe(*settings, model_path=random_model(tmp_path / "model"))
    report = run_recipe(recipe, tmp_path / "runs")["report"].path
    document = json.loads((report / "report.json").read_text())
    assert "the dense base knows nothing about this task" in document["verdict"]
    assert not any("recovery" in found for found in document["rows"])
    assert "recovery" not in (report / "report.md").read_text().splitlines()[2]
    assert '"recovery" is' not in (report / "index.html").read_text()
