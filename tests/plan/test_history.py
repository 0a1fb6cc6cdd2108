"""Times of `plan` are ranges; where this machine has run the same pass, they are its times."""

import pytest

from conftest import small_recipe
from sqft_export.artifacts import store as artifact
from sqft_export.artifacts.store import Store, environment
from sqft_export.plan.history import PassTime, earlier_seconds
from sqft_export.plan.speeds import Speed, Speeds
from sqft_export.report.text import plan_text, range_text
from sqft_export.run import preview

CPU = Speed("cpu", {"float32": 1e11, "bfloat16": 1e11}, 1e9)
FACTS = {
    "stage": "adapt",
    "version": 1,
    "options": {"adapt.steps": 12, "adapt.batch": 8, "adapt.learning_rate": 1e-3},
    "reads": {"model": "abc", "device": "cpu"},
    "parents": {},
}


def finished(runs, seconds: float, facts=FACTS, run: str = "one"):
    """Seal an artifact that took so long."""
    store = Store(runs / run)
    partial = store.open_partial("adapt", artifact.key_of(facts), False)
    (partial / "weights").write_text("1")
    return store.seal(partial, "adapt", facts, {}, seconds)


def changed(**options) -> dict:
    return FACTS | {"options": FACTS["options"] | options}


def test_the_same_work_takes_what_it_took_in_any_run(tmp_path):
    assert earlier_seconds(FACTS, tmp_path) is None
    finished(tmp_path, 600.0)
    assert earlier_seconds(FACTS, tmp_path) == 600.0
    assert earlier_seconds(changed(**{"adapt.learning_rate": 1e-5}), tmp_path) == 600.0


@pytest.mark.parametrize(
    "other",
    [
        changed(**{"adapt.steps": 24}),
        changed(**{"adapt.batch": 16}),
        FACTS | {"version": 2},
        FACTS | {"stage": "teacher"},
        FACTS | {"reads": {"model": "abd", "device": "cpu"}},
        FACTS | {"reads": {"model": "abc", "device": "cuda"}},
    ],
)
def test_other_work_is_predicted(tmp_path, other):
    finished(tmp_path, 600.0)
    assert earlier_seconds(other, tmp_path) is None


@pytest.mark.parametrize("field", ["processor", "threads", "platform"])
def test_times_of_another_machine_do_not_count(tmp_path, monkeypatch, field):
    there = environment() | {field: "other"}
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(artifact, "environment", lambda: there)
        finished(tmp_path, 600.0)
    assert earlier_seconds(FACTS, tmp_path) is None


def test_the_newest_run_counts_and_a_damaged_one_does_not(tmp_path, monkeypatch):
    for year, seconds in ((2025, 50.0), (2026, 70.0)):
        with monkeypatch.context() as then:
            made = environment() | {"time": f"{year}-01-01T00:00:00+00:00"}
            then.setattr(artifact, "environment", lambda made=made: made)
            facts = changed(**{"adapt.learning_rate": float(year)})
            last = finished(tmp_path, seconds, facts, str(year))
    assert earlier_seconds(FACTS, tmp_path) == 70.0
    (last.path / "manifest.json").write_text("{}")
    assert earlier_seconds(FACTS, tmp_path) == 50.0


def test_a_repeated_pass_is_known_better_than_a_predicted_one():
    low, high = PassTime(600, "model").range
    assert low < 600 < high
    closer = PassTime(600, "earlier run").range
    assert low < closer[0] < 600 < closer[1] < high


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (480, 960, "8 to 16 min"),
        (50, 120, "50 s to 2 min"),
        (0.9, 1.2, "1 s"),
        (4000, 9000, "67 min to 2.5 h"),
    ],
)
def test_ranges_are_written_as_people_write_them(low, high, text):
    assert range_text(low, high) == text


def test_plan_says_where_a_time_is_from(tiny_run, monkeypatch):
    monkeypatch.setattr(preview, "measure_speeds", lambda *_: Speeds(CPU, CPU, CPU, 1e9))
    root = tiny_run["merge"].path.parent
    recipe = small_recipe("adapt.learning_rate=1e-3", "verify.prompts=4", "name=elsewhere")
    document = preview.preview(recipe, root.parent)
    passes = {step.name: step for step in document.passes}
    took = tiny_run["adapt"].manifest["seconds"]
    assert not passes["adapt"].cached
    assert passes["adapt"].predicted_seconds == took
    assert passes["verify"].seconds_from == "model"
    lines = {line.split()[0]: line for line in plan_text(document).splitlines()[1:]}
    assert lines["adapt"].endswith(", as an earlier run took")
    assert " to " in lines["verify"] and "earlier" not in lines["verify"]
    low, high = document.seconds_range
    assert low < document.seconds < high
    assert f"total time on this machine: {range_text(low, high)}" in plan_text(document)
