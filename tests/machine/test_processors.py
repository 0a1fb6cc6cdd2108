"""Threads are as many as processors are free; a busy machine is named; a user's number stands."""

import os
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from sqft_export.errors import UserError
from sqft_export.machine import processors
from sqft_export.machine.host import THREADS_VARIABLE, allowed_processors
from sqft_export.machine.processors import (
    OPENMP_THREADS,
    SPIN_COUNT,
    SPIN_VARIABLES,
    THREADS_FILE,
    Sample,
    busy_text,
    busy_ticks,
    deployed_environment,
    free_threads,
    limit_openmp_spinning,
    sample,
    set_threads,
    used_by_others,
)
from sqft_export.plan.speeds import Speed, Speeds

STAT = """cpu  100 10 20 900 5 1 2 3 4 0
cpu0 50 5 10 400 5 1 2 3 4 0
cpu1 40 5 10 500 0 0 0 0 0 0
cpu10 7 0 0 0 0 0 0 0 0 0
intr 12 0 9
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Remove the variables that a test sets."""
    for name in (THREADS_VARIABLE, OPENMP_THREADS, *SPIN_VARIABLES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(processors, "_variables_set", set())
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))


def others_use(monkeypatch, used: float) -> None:
    """As if other processes kept so many processors busy."""
    moments = iter(Sample(at=n, busy=n * (used + 0.5), own=n * 0.5) for n in range(9))
    monkeypatch.setattr(processors, "sample", lambda: next(moments))
    monkeypatch.setattr(processors, "SAMPLE_SECONDS", 0.0)


@pytest.mark.parametrize(("allowed", "ticks"), [({0}, 71), ({0, 1}, 126), ({10}, 7), ({5}, 0)])
def test_busy_is_all_but_idle_and_waiting_of_the_allowed_processors(allowed, ticks):
    assert busy_ticks(STAT, allowed) == ticks


@pytest.mark.parametrize(
    ("others", "count"), [(0.0, 4), (0.4, 4), (0.6, 3), (1.0, 3), (3.2, 1), (4.0, 1), (9.0, 1)]
)
def test_as_many_threads_as_processors_are_free(monkeypatch, others, count):
    assert free_threads(others, 4) == count
    others_use(monkeypatch, others)
    said = set_threads(None)
    assert allowed_processors() == int(os.environ[OPENMP_THREADS]) == count
    if others < processors.MIN_BUSY_PROCESSORS:
        assert said is None
    else:
        assert f"use {min(others, 4):.1f} of 4 processors; {count} of 4 threads" in said
        assert "--threads" in said and "rounded" in said


def test_a_number_that_a_user_gives_stands(monkeypatch):
    others_use(monkeypatch, 4.0)
    assert set_threads(3) is None
    assert allowed_processors() == int(os.environ[OPENMP_THREADS]) == 3
    monkeypatch.delenv(THREADS_VARIABLE)
    monkeypatch.setenv(OPENMP_THREADS, "2")
    assert set_threads(None) is None
    assert os.environ[OPENMP_THREADS] == "2" and allowed_processors() == 4


def test_more_threads_than_processors_are_refused():
    with pytest.raises(UserError, match="--threads: found 5; allowed are 1 to 4"):
        set_threads(5)


def test_an_interrupted_run_resumes_with_its_threads(monkeypatch, tmp_path):
    """Its checkpoint came from products that so many threads rounded."""
    (tmp_path / THREADS_FILE).write_text("4")
    others_use(monkeypatch, 2.0)
    set_threads(None, tmp_path)
    assert os.environ[OPENMP_THREADS] == "2"  # nothing was interrupted there
    monkeypatch.delenv(OPENMP_THREADS)
    monkeypatch.delenv(THREADS_VARIABLE)
    (tmp_path / "adapt-0123.partial").mkdir()
    others_use(monkeypatch, 2.0)
    assert "interrupted" in set_threads(None, tmp_path)
    assert os.environ[OPENMP_THREADS] == "4"


@pytest.mark.parametrize("content", ["", "many", "4,2"])
def test_a_damaged_number_of_threads_counts_for_nothing(monkeypatch, tmp_path, content):
    (tmp_path / THREADS_FILE).write_text(content)
    (tmp_path / "adapt-0123.partial").mkdir()
    others_use(monkeypatch, 1.0)
    set_threads(None, tmp_path)
    assert os.environ[OPENMP_THREADS] == "3"


def test_without_proc_nothing_is_chosen(monkeypatch, tmp_path):
    monkeypatch.setattr(processors, "STAT", tmp_path / "missing")
    assert sample() is None and used_by_others(None) == 0.0
    assert set_threads(None) is None
    assert OPENMP_THREADS not in os.environ and allowed_processors() == 4


def test_runtimes_are_measured_without_our_way_to_wait(monkeypatch):
    limit_openmp_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == SPIN_COUNT
    assert "GOMP_SPINCOUNT" not in deployed_environment()
    monkeypatch.setattr(processors, "_variables_set", set())
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # a user's own
    limit_openmp_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ
    assert deployed_environment()["OMP_WAIT_POLICY"] == "active"


def test_another_process_is_seen_and_own_work_is_not(monkeypatch):
    monkeypatch.undo()
    before = sample()
    if before is None:
        pytest.skip("no /proc/stat here")
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(1.0)
        assert used_by_others(before) > 0.25
    finally:
        busy.kill()
        busy.wait()
    before, started = sample(), time.process_time()
    while time.process_time() - started < 0.5:
        pass
    after = sample()
    assert after.own - before.own > 0.4  # what this process used is known, and taken off
    assert after.busy - before.busy > 0.4


def test_plan_says_that_it_measured_a_busy_machine():
    from sqft_export.plan.document import Need, PlanDocument
    from sqft_export.report.text import plan_text

    speed = Speed("cpu", {"float32": 1e11, "bfloat16": 1e11}, 1e9)
    enough = Need(needed_bytes=1, free_bytes=2)
    document = PlanDocument(
        **{"recipe": "r", "model": "m", "weights": 1, "passes": [], "group_size": None},
        **{"disk": enough, "memory": enough, "device_memory": None, "lengths_counted": ""},
        gpus=[],
        **{
            "seconds": 9,
            "seconds_range": (6, 13),
            "within_a_day": None,
            "first_example": None,
            "gguf": None,
            "sparse_execution": None,
            "expectation": None,
        },
        **{"group_size_fallback": {}, "warnings": [], "accepted_by": {}},
        machine=Speeds(speed, speed, speed, 1e9, 0.1),
    )
    busy = document.model_copy(update={"machine": Speeds(speed, speed, speed, 1e9, 1.2)})
    said = [plan_text(document), plan_text(busy)]
    assert "busy" not in said[0]
    assert f"busy machine: {busy_text(1.2)}" in said[1]


def test_commands_take_threads_before_torch_counts_them(tmp_path):
    """In a separate process, torch has the number of threads of the option."""
    code = (
        "import sys\n"
        "from sqft_export import cli\n"
        "from sqft_export.commands.machine import set_compute_threads\n"
        "assert 'torch' not in sys.modules\n"
        "set_compute_threads(1)\n"
        "import torch\n"
        "from sqft_export.artifacts.store import environment\n"
        "print(torch.get_num_threads(), environment()['threads'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "1"]


@pytest.mark.parametrize("command", ["run", "plan", "sweep", "export", "verify", "benchmark"])
def test_every_command_that_computes_offers_threads(command):
    done = subprocess.run(
        [sys.executable, "-m", "sqft_export.cli", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "200", "TERM": "dumb"},
    )
    assert "--threads" in done.stdout
