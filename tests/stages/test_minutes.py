"""A benchmark of so many minutes scores as many items as all rows together have time for."""

import itertools

import pytest

from conftest import small_recipe
from sqft_export.data.items import Data, load_tokenizer
from sqft_export.machine.processes import Processes
from sqft_export.measure.jobs import LatencySamples, TimedScores, WorkerResult
from sqft_export.measure.rows import Row
from sqft_export.model.hub import model_folder
from sqft_export.stages import Context, benchmark
from sqft_export.stages.benchmark import PILOT_ITEMS, _measure_rows


class _Clock:
    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def measured(tiny_run, monkeypatch, tmp_path):
    """``measured(minutes, seconds per item of each row) -> items, jobs``."""

    def run(minutes: float, seconds: dict[str, float], *more: str):
        recipe = small_recipe(f"benchmark={{minutes: {minutes}, rounds: 2}}", *more)
        folder, clock, jobs = model_folder(recipe, download=False), _Clock(), []
        table = [
            Row(name, "compressed", name, "torch", tmp_path / name, (), 0.0) for name in seconds
        ]
        names = {row.folder: row.name for row in table}

        def measure_in_process(model, requests, scratch, group):
            name, asked = names[model.folder], requests.questions
            taken = seconds[name] * len(asked.prompts) if asked else 0.0
            clock.now += taken + 1
            also = ("lm_eval",) if requests.lm_eval else ()
            count = len(asked.prompts) if asked else None
            jobs.append((name, count, requests.latency is not None, *also))
            scores = TimedScores(perplexity=2.0, token_accuracy=0.5, seconds=taken)
            return WorkerResult(
                load_seconds=1.0,
                steady_memory_bytes=1,
                peak_memory_bytes=1,
                latency=LatencySamples(ttft=[1.0], tpot=[1.0]) if requests.latency else None,
                scores=scores if asked else None,
            )

        monkeypatch.setattr(benchmark, "measure_in_process", measure_in_process)
        monkeypatch.setattr(benchmark.time, "monotonic", clock.monotonic)
        silent = lambda total: lambda note="": None  # noqa: E731
        context = Context("benchmark", recipe, folder, tiny_run, tmp_path, silent)
        tokenizer = load_tokenizer(folder)
        items, found = _measure_rows(
            context, table, Data(recipe, tokenizer).test, tokenizer, Processes()
        )
        assert [len(each.latencies) for each in found.values()] == [2] * len(table)
        return items, jobs, clock.now

    return run


def test_all_rows_score_the_same_items_and_keep_to_the_time(measured):
    items, jobs, taken = measured(2, {"slow": 1.0, "fast": 0.25})
    assert jobs[:4] == [
        ("slow", PILOT_ITEMS, True),
        ("fast", PILOT_ITEMS, True),
        ("fast", None, True),
        ("slow", None, True),
    ]
    assert jobs[4:] == [("slow", len(items), False), ("fast", len(items), False)]
    assert len(items) > PILOT_ITEMS and 110 < taken < 125


def test_tasks_of_lm_eval_do_not_take_the_time_of_the_items(measured):
    """They are scored once, with all items, not with the few that tell how many fit."""
    _, jobs, _ = measured(2, {"slow": 1.0, "fast": 0.25}, "benchmark.lm_eval=[hellaswag]")
    assert [job[0] for job in jobs if "lm_eval" in job] == ["slow", "fast"]
    assert jobs[-2:] == [job for job in jobs if "lm_eval" in job]


def test_however_short_the_time_a_few_items_are_scored(measured):
    items, jobs, _ = measured(0.01, {"slow": 5.0})
    assert len(items) == PILOT_ITEMS
    assert list(itertools.chain(jobs))[-1] == ("slow", PILOT_ITEMS, False)


def test_there_are_no_more_items_than_there_are(measured):
    items, _, taken = measured(1000, {"fast": 0.001})
    assert len(items) == 1000 and taken < 60
