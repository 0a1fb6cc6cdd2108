"""The command line used wrongly: one message, an exit code of its kind, no traceback."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from conftest import ROOT, SMALL, SQFT


def sqft(*arguments: str, cwd: Path = ROOT, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [SQFT, *arguments], cwd=cwd, capture_output=True, text=True, check=False, **more
    )


def refused(done: subprocess.CompletedProcess, code: int = 2) -> str:
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, (done.returncode, done.stderr)
    assert done.stderr.strip()
    return done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("run",),
        ("run", "nope.yaml"),
        ("run", "."),
        ("run", "recipes/tiny.yaml", "nonsense"),
        ("plan", "recipes/tiny.yaml", "--model-path", "nowhere"),
        ("plan", "recipes/tiny.yaml", "--model-path", "README.md"),
        ("plan", "/dev/null"),
        ("export", "recipes/tiny.yaml", "--only", "tensorrt"),
        ("export", "recipes/tiny.yaml", "export.targets=[]"),
        ("list",),
        ("list", "nothing"),
        ("benchmark",),
        ("benchmark", "nowhere"),
        ("benchmark", "README.md"),
        ("benchmark", "."),
        ("inspect", "README.md"),
        ("inspect", "nowhere"),
        ("inspect", "docs"),
        ("verify", "nowhere"),
        ("verify", "docs"),
        ("verify", "README.md"),
        ("compare",),
        ("compare", "docs"),
        ("compare", "docs", "tests"),
        ("sweep", "recipes/tiny.yaml"),
        ("sweep", "recipes/tiny.yaml", "--over", "sparsify.sparsity"),
        ("sweep", "recipes/tiny.yaml", "--over", "=1,2"),
        ("pack", "docs", "out"),
        ("pack", "nowhere", "out"),
        ("unpack", "docs", "out"),
        ("unpack", "README.md", "out"),
    ],
)
def test_a_misuse_is_one_message(arguments, sqft_here):
    done = sqft_here(*arguments)
    refused(done)
    assert len(done.stderr) < 4000


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch", "0"),
        ("--batch", "1,x"),
        ("--prompt-tokens", "-1"),
        ("--prompt-tokens", "9" * 40),
        ("--new-tokens", "1"),
        ("--rounds", "0"),
        ("--threads", "0"),
        ("--cpus", "999"),
        ("--items", "0"),
        ("--task", "gsm8"),
        ("--text", "nowhere.txt"),
        ("--device", "tpu"),
    ],
)
def test_an_option_out_of_range_is_one_message(tiny_run, sqft_here, option, value):
    folder = str(tiny_run["export-onnx"].path / "model")
    refused(sqft_here("benchmark", folder, option, value))


def test_the_same_folder_twice_and_a_task_with_a_text_are_refused(tiny_run, sqft_here):
    folder = str(tiny_run["export-onnx"].path / "model")
    assert "found the same folder twice" in refused(sqft_here("benchmark", folder, folder))
    both = sqft_here("benchmark", folder, "--task", "gsm8k", "--text", "README.md")
    assert "only one of them is allowed" in refused(both)


def test_a_refused_command_is_one_message_in_its_own_process():
    refused(sqft("run", "nope.yaml"))


def test_a_name_that_is_no_text_is_one_message():
    done = subprocess.run(
        [SQFT, "plan", b"\xff\xfe.yaml"], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 2 and b"Traceback" not in done.stderr


def test_a_folder_that_can_not_be_written_is_named(tmp_path, sqft_here):
    (tmp_path / "runs").write_text("a file")
    done = sqft_here("run", "recipes/tiny.yaml", *SMALL, "--runs", str(tmp_path / "runs"))
    refused(done, 3)


def test_plan_writes_nothing_of_the_users(tmp_path, sqft_here):
    (tmp_path / ".speed").write_text("mine")
    done = sqft_here("plan", "recipes/tiny.yaml", "--runs", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".speed").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [".speed"]


def test_a_link_in_place_of_our_files_is_not_followed(tmp_path, sqft_here):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / ".lock").symlink_to(victim)
    refused(sqft_here("run", "recipes/tiny.yaml", *SMALL, "--runs", str(tmp_path / "runs")))
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_says_how_to_go_on(tmp_path, number, code):
    process = subprocess.Popen(
        [SQFT, "run", "recipes/tiny.yaml", *SMALL, "--runs", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and so would the run.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(600):
        if list(tmp_path.glob("tiny/*.partial")):
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == code, said
    assert "the same command resumes the run" in said and "Traceback" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_can_not_be_written_is_told(tiny_run):
    folder = str(tiny_run["export-onnx"].path / "model")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [SQFT, "inspect", folder], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode != 0 and "Traceback" not in done.stderr


def test_a_disk_that_is_full_is_told_with_the_pass(tmp_path):
    """By a limit on the size of files, which the system refuses as it does a full disk."""
    command = (
        f"ulimit -f 200; exec {SQFT} run recipes/tiny.yaml {' '.join(SMALL)} --runs {tmp_path}"
    )
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode not in (0, 1), (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("tiny/sparsify-*[0-9a-f]/manifest.json"))
