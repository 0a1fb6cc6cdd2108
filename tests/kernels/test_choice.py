"""How long a choice of kernels is kept, and how it is pinned or forgotten."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from sqft_export.errors import UserError
from sqft_export.kernels import choice
from sqft_export.kernels.extension import unavailable_reason
from sqft_export.kernels.library import Matrix, count_kept
from sqft_export.machine import processors
from sqft_export.packed.execution import available_execution, resolve_execution

pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason="the extension is not built")


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(choice.EXECUTION_VARIABLE, raising=False)


@pytest.fixture
def busy_processors():
    """Another process on every processor that this one may run on."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    time.sleep(0.5)
    yield
    for other in others:
        other.kill()
        other.wait()


def choose(size: int = 64) -> str:
    codes = np.random.default_rng(0).integers(0, 256, size * size).astype(np.uint8)
    matrix = Matrix(8, size, size, codes, 0, None, np.ones((size, 1), np.float16))
    return choice.Chooser(2**20)(None, matrix, count_kept(matrix))


def only_entry() -> dict:
    (known,) = json.loads(choice.cache_file().read_text()).values()
    (entry,) = known.values()
    return entry


def test_a_choice_made_under_load_is_kept_for_an_hour_at_most(busy_processors):
    choose()
    left = only_entry()["until"] - time.time()
    assert 0 < left <= choice.BUSY_MAX_AGE_SECONDS


def test_a_choice_out_of_date_is_measured_again(monkeypatch):
    choose()
    file = choice.cache_file()
    first = only_entry()["until"]
    choose()
    assert only_entry()["until"] == first  # remembered
    for until in (time.time() - 1, 0.0, time.time() + 10 * choice.MAX_AGE_SECONDS):
        file.write_text(file.read_text().replace(str(only_entry()["until"]), str(until)))
        choose()
        assert only_entry()["until"] != until
        assert 0 < only_entry()["until"] - time.time() <= choice.MAX_AGE_SECONDS


def test_a_choice_of_another_version_does_not_count(monkeypatch):
    choose()
    before = choice.machine_key()
    choice.machine_key.cache_clear()
    real = choice.importlib.metadata.version
    monkeypatch.setattr(choice.importlib.metadata, "version", lambda name: real(name) + ".post1")
    try:
        assert choice.machine_key() != before
        assert not choice.MeasurementCache().known
    finally:
        choice.machine_key.cache_clear()


def test_what_other_processes_use_is_told_from_what_this_one_does():
    before = processors.Sample(10.0, 100.0, 5.0)
    assert processors.used_between(before, processors.Sample(12.0, 103.0, 6.0)) == 1.0
    assert processors.used_between(before, processors.Sample(12.0, 103.0, 8.0)) == 0.0
    assert processors.used_between(before, processors.Sample(12.0, 102.9, 8.0)) == 0.0


@pytest.mark.parametrize("pinned", ["sparse", "dense", "stock"])
def test_the_environment_pins_what_auto_means(monkeypatch, pinned):
    monkeypatch.setenv(choice.EXECUTION_VARIABLE, pinned)
    assert available_execution("auto") == resolve_execution("auto") == pinned
    for asked in ("sparse", "dense", "stock"):
        assert available_execution(asked) == asked  # the program's own setting wins


def test_a_pin_that_is_no_kernel_is_refused(monkeypatch):
    monkeypatch.setenv(choice.EXECUTION_VARIABLE, "fast")
    with pytest.raises(UserError, match=r"SQFT_EXPORT_EXECUTION: found 'fast'; allowed are auto"):
        available_execution("auto")
    monkeypatch.setenv(choice.EXECUTION_VARIABLE, "auto")
    assert available_execution("auto") == "auto"


def test_choices_can_be_listed_and_cleared():
    choose()
    command = [sys.executable, "-m", "sqft_export.kernels.choice"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert only_entry()["form"] in shown and '"rows": 64' in shown
    cleared = subprocess.run([*command, "--clear"], capture_output=True, text=True, check=True)
    assert "cleared" in cleared.stdout and not choice.cache_file().exists()
