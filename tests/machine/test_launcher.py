"""A launcher's environment variables are used, or refused before any work."""

import fcntl
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from conftest import ROOT, SMALL
from sqft_export.errors import UserError
from sqft_export.machine import launcher
from sqft_export.machine.launcher import (
    check_launcher,
    first_process_presence,
    first_process_works,
    wait_for_first,
)

WHOLE = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "1"}, "RANK=1: set without WORLD_SIZE, LOCAL_RANK"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0: set without RANK, WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1, WORLD_SIZE=1: set without LOCAL_RANK"),
        ({"WORLD_SIZE": "8"}, "unset WORLD_SIZE"),
        (WHOLE | {"RANK": "2"}, "RANK=2, WORLD_SIZE=2, LOCAL_RANK=1: RANK is not below WORLD_SIZE"),
        (WHOLE | {"RANK": "a"}, "RANK is not a number"),
        (WHOLE | {"LOCAL_RANK": ""}, "set without LOCAL_RANK"),
    ],
)
def test_variables_left_over_are_named(variables, said, monkeypatch):
    """A pod of a training operator, a shell that a job was started from."""
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(said)):
        check_launcher()


@pytest.mark.parametrize(
    ("command", "variables"),
    [("run", {"RANK": "1", "WORLD_SIZE": "1"}), ("run", {"RANK": "a"}), ("plan", {"RANK": "1"})],
)
def test_they_are_refused_before_any_work(command, variables, tmp_path):
    done = sqft_with(variables, command, "recipes/tiny.yaml", "--runs", str(tmp_path / "runs"))
    assert done.returncode == 2, done.stderr
    assert "unset RANK" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def sqft_with(variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    """The command line with variables of a launcher; it waits a second for the others."""
    code = (
        "import sys; from sqft_export.machine import launcher; launcher.START_SECONDS = 1.0;"
        "from sqft_export.cli import main; sys.argv[0] = 'sqft-export'; main()"
    )
    clean = {name: value for name, value in os.environ.items() if name not in WHOLE}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=clean | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_what_a_launcher_sets_is_taken(monkeypatch):
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    check_launcher()
    for name in WHOLE:
        monkeypatch.delenv(name)
    check_launcher()
    monkeypatch.setenv("LOCAL_RANK", "-1")
    check_launcher()


def test_a_process_that_waits_says_so_and_ends_without_a_first_one(tmp_path):
    done = sqft_with(WHOLE, "run", "recipes/tiny.yaml", *SMALL, "--runs", str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "RANK=1, WORLD_SIZE=2: this process waits for the others" in done.stderr
    assert "Traceback" not in done.stderr


def test_waiting_lasts_as_long_as_the_first_process_works(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "MAX_ABSENCE_SECONDS", 0.3)
    monkeypatch.setattr(launcher, "POLL_SECONDS", 0.05)
    sealed, ended = tmp_path / "sealed", threading.Event()

    def first() -> None:
        with first_process_presence(tmp_path):
            ended.wait(1.0)
            sealed.touch()

    working = threading.Thread(target=first)
    working.start()
    while not first_process_works(tmp_path):
        time.sleep(0.01)
    wait_for_first(tmp_path, sealed.exists)
    assert sealed.exists()
    working.join()
    assert not first_process_works(tmp_path)
    with pytest.raises(UserError, match=r"waits for the first one \(RANK=0\)"):
        wait_for_first(tmp_path, lambda: False)


def test_looking_for_the_first_process_takes_no_lock_from_it(tmp_path):
    assert not first_process_works(tmp_path)
    (tmp_path / launcher.PRESENCE_FILE).touch()
    assert not first_process_works(tmp_path)
    with (tmp_path / launcher.PRESENCE_FILE).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
