"""A run writes the figures of every pass and training step to the loggers of its recipe."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from conftest import TINY, copy_run, small_recipe
from sqft_export.adapters.files import read_training_log
from sqft_export.artifacts.store import Store
from sqft_export.errors import UserError
from sqft_export.machine.host import installed
from sqft_export.plan.checks import check_recipe
from sqft_export.report.document import REPORT, read_report
from sqft_export.report.loggers import curves_of, figures_of
from sqft_export.run.pipeline import plan_passes, run_recipe

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def events(folder: Path) -> "EventAccumulator":
    """Read the only event file below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents.*")
    return EventAccumulator(str(file)).Reload()


def values(found: "EventAccumulator", tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_a_cached_run_is_logged_completely_and_keeps_its_artifacts(tiny_run, tmp_path):
    root = copy_run(tiny_run, tmp_path)
    again = run_recipe(small_recipe("log=[tensorboard]"), root)
    assert {n: a.key for n, a in again.items()} == {n: a.key for n, a in tiny_run.items()}
    found = events(root)
    steps = read_training_log(tiny_run["adapt"].path)
    assert values(found, "train/loss") == [(e["step"], pytest.approx(e["loss"])) for e in steps]
    last = len(steps)
    assert values(found, "eval/quantize/kl_nats")[0][0] == 0  # before the training
    assert values(found, "eval/merge/sparsity") == [
        (last, pytest.approx(tiny_run["merge"].metrics["sparsity"]["all"]))
    ]
    for row in read_report(again["report"].path / REPORT).rows:
        assert values(found, f"eval/benchmark/{row.id}/accuracy") == [
            (last, pytest.approx(row.accuracy))
        ]
        assert values(found, f"eval/benchmark/{row.id}/tpot/median_ms")
    assert values(found, "eval/verify/failed_checks") == [(last, 0.0)]
    durations = {tag.split("/")[1] for tag in found.Tags()["scalars"] if tag.endswith("/seconds")}
    assert durations == set(tiny_run)
    report = read_report(again["report"].path / REPORT)
    assert "log" not in report.recipe
    assert not [one for one in report.overrides if one.startswith("log")]


def test_training_steps_and_passes_are_one_event_file(tiny_run, tmp_path):
    root = copy_run(tiny_run, tmp_path)
    recipe = small_recipe("adapt.steps=3", "log=[tensorboard]")
    made = run_recipe(recipe, root, last=("adapt",))
    found, steps = events(root), read_training_log(made["adapt"].path)
    for name in ("loss", "learning_rate", "tokens"):
        expected = [(e["step"], pytest.approx(e[name])) for e in steps]
        assert values(found, f"train/{name}") == expected
    assert [n for n, _ in values(found, "eval/adapt/last_loss")] == [3]
    assert values(found, "eval/sparsify/perplexity")
    assert "WANDB_PROJECT" not in os.environ


def test_loggers_are_in_no_key(tmp_path):
    recipes = small_recipe(), small_recipe("log=[tensorboard, trackio]")
    assert recipes[1].log == ("tensorboard", "trackio")
    plain, logging = ([s.key for s in plan_passes(r, TINY, Store(tmp_path))] for r in recipes)
    assert plain == logging


def test_plan_refuses_a_logger_that_is_not_installed():
    missing = [name for name in ("wandb", "mlflow", "trackio") if not installed(name)]
    if not missing:
        pytest.skip("all loggers are installed")
    recipe = small_recipe(f"log=[{', '.join(missing)}]")
    with pytest.raises(UserError) as refused:
        check_recipe(recipe, TINY)
    for name in missing:
        line = f"log: found {name}, not installed here; pip install {name}, or remove {name}"
        assert line in str(refused.value)


def test_figures_per_linear_are_left_out():
    metrics = {"sparsity": {"all": 0.5, "a.b": 0.5}, "device": "cpu", "packed": {"bytes": 3}}
    assert dict(figures_of(metrics)) == {"sparsity": 0.5, "packed/bytes": 3}
    curves = dict(curves_of({"block_errors": [(3.0, 2.0), (2.0, 1.0)]}))
    assert curves == {"block_errors/before": [3.0, 2.0], "block_errors/after": [2.0, 1.0]}
