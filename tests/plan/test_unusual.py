"""Settings that are allowed but rarely intended give a warning that names both values."""

import pytest

from conftest import TINY, small_recipe
from sqft_export.plan.layout import layout_of
from sqft_export.plan.unusual import find_calibration_doubts, find_training_doubts

EXAMPLES = len((TINY / "train.jsonl").read_text().splitlines())


def doubts(*settings: str) -> list[str]:
    recipe = small_recipe("adapt.batch=32", "adapt.steps=120", "calibration.samples=128", *settings)
    layout = layout_of(recipe, TINY)
    return [*find_training_doubts(recipe, layout), *find_calibration_doubts(recipe, layout)]


def test_the_embedded_recipe_gives_no_warning():
    assert doubts() == []
    assert doubts("adapt=none") == []


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("adapt.warmup_steps=120", ("warmup_steps: found 120", "has 120 steps")),
        ("adapt.warmup_steps=500", ("warmup_steps: found 500", "has 120 steps")),
        ("adapt.learning_rate=0.5", ("learning_rate: found 0.5", "1e-06 to 0.01")),
        ("adapt.learning_rate=1e-7", ("learning_rate: found 1e-07", "1e-06 to 0.01")),
        ("adapt.batch=1", ("steps: found 120 steps", f"of the {EXAMPLES} training examples")),
        ("adapt.steps=20000", ("steps: found 20000 steps", f"each of the {EXAMPLES}")),
        ("calibration.samples=1", ("samples: found 1;", "112 tokens", "one per input")),
    ],
)
def test_a_warning_names_both_values(setting, words):
    warnings = " ".join(doubts(setting))
    for word in words:
        assert word in warnings


@pytest.mark.parametrize("epochs", [1, 30])
def test_epochs_are_counted_in_steps(epochs):
    warnings = doubts(f"adapt={{epochs: {epochs}, batch: 32, warmup_steps: 10}}")
    assert bool(warnings) == (epochs == 30)
    assert all("adapt.epochs" in one and "30 times" in one for one in warnings)


def test_warmup_is_compared_with_the_steps_of_all_epochs():
    (warning,) = doubts("adapt={epochs: 1, batch: 32, warmup_steps: 9999}")
    assert "warmup_steps: found 9999" in warning and f"has {-(-EXAMPLES // 32)} steps" in warning
