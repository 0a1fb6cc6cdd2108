"""Sweeps on several machines: shards, lists of commands, searches, and passes that run once."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, SQFT
from sqft_export.errors import UserError
from sqft_export.machine.host import installed
from sqft_export.run.combinations import Sweep, parse_axes, shard_of
from sqft_export.run.sweeps import pass_tasks

OVER = ("--over", "sparsify.sparsity=0.4,0.5,0.6", "--over", "quantize.bits=4,8")
# As little of each pass as a report needs.
QUICK = (
    *("adapt=none", "calibration.samples=4", "export.targets=[openvino]", "verify.prompts=2"),
    *("export.sparse_files=false", "export.sparse_execution=false", "benchmark.items=2"),
    *("benchmark.repeats=2", "benchmark.rounds=1", "benchmark.new_tokens=2"),
    "benchmark.baselines=[merged]",
)


def test_shards_are_disjoint_and_complete():
    items = list(range(13))
    for count in (1, 3, 8, 20):
        shards = [shard_of(items, f"{number}/{count}") for number in range(1, count + 1)]
        assert sorted(item for shard in shards for item in shard) == items
        assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("shard", ["0/8", "9/8", "3", "a/b", "1/0", "-1/2", ""])
def test_a_wrong_shard_is_named(shard):
    with pytest.raises(UserError, match=r"--shard: found .* such as 3/8"):
        shard_of([1], shard)


def test_list_prints_a_command_per_combination_and_each_parses(sqft_here, tmp_path):
    runs = str(tmp_path / "a folder")
    done = sqft_here("sweep", "recipes/tiny.yaml", "seed=3", *OVER, "--runs", runs, "--list")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) == 6
    assert [line[-2:] for line in lines] == [["--shard", f"{n}/6"] for n in range(1, 7)]
    assert all(
        line[:4] == ["sqft-export", "sweep", "recipes/tiny.yaml", "seed=3"] for line in lines
    )
    assert all(runs in line for line in lines)
    assert not Path(runs).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shard", "1/2", "--list"), "--shard and --list: found together"),
        (("--search", "tpe"), "--search: found no goal"),
        (("--minimize", "size"), "--minimize, --maximize: found size without --search"),
        (
            ("--search", "tpe", "--minimize", "size", "--maximize", "size"),
            "found the same goal in both",
        ),
        (("--shard", "4/3"), "--shard: found '4/3'"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_any_work(
    sqft_here, tmp_path, options, message
):
    runs = tmp_path / "runs"
    done = sqft_here("sweep", "recipes/tiny.yaml", *OVER, "--runs", str(runs), *options)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not runs.exists()


@pytest.mark.skipif(installed("ray"), reason="Ray is installed")
def test_without_ray_one_line_says_what_to_install(sqft_here, tmp_path):
    done = sqft_here("sweep", "recipes/tiny.yaml", *OVER, "--ray", "--runs", str(tmp_path / "runs"))
    assert done.returncode == 2
    assert done.stderr == "error: --ray: Ray is not installed; pip install 'sqft-export[ray]'\n"


def test_combinations_share_their_passes(tmp_path):
    """Two sparsities with two ranks of bits: two sparsify passes, four of everything after."""
    sweep = Sweep(
        ROOT / "recipes" / "tiny.yaml",
        QUICK,
        parse_axes(["sparsify.sparsity=0.5,0.6", "quantize.bits=4,8"]),
        None,
    )
    tasks = list(pass_tasks(sweep, tmp_path).values())
    count = {name: sum(task.name == name for task in tasks) for name in ("sparsify", "report")}
    assert count == {"sparsify": 2, "report": 4}
    assert [task.combinations for task in tasks if task.name == "sparsify"] == [2, 2]
    earlier: set[str] = set()
    for task in tasks:
        assert set(task.parents) <= earlier and task.memory > 0
        earlier.add(task.key)


def test_the_commands_of_the_guide_parse():
    """The page on several GPUs and machines; slow tests run sweeps in each of these ways."""
    import typer

    from sqft_export.cli import app

    page = (ROOT / "docs" / "how-to" / "several-gpus.md").read_text()
    lines = [line.strip() for line in page.splitlines() if line.startswith("    sqft-export ")]
    command = typer.main.get_command(app)
    for line in lines:
        _, name, *arguments = shlex.split(line)
        context = command.commands[name].make_context(name, arguments)
        given = context.params
        if name == "sweep":
            sweep = Sweep(Path(given["recipe"]), (), parse_axes(given["over"]), None)
            assert all(sweep.load(settings) for settings in sweep.combinations)
    assert len(lines) >= 7


WORKER = """
import sys
from pathlib import Path
from conftest import small_recipe
from sqft_export.run.pipeline import run_recipe
recipe = small_recipe("adapt=none", "calibration.samples=32", "quantize.bits=" + sys.argv[2])
run_recipe(recipe, Path(sys.argv[1]), ("quantize",), worker=sys.argv[3])
"""


@pytest.mark.slow
def test_two_workers_in_one_folder_run_each_pass_once(tmp_path):
    """Both need the same sparsify pass; each quantizes with other bits."""
    root = tmp_path / "tiny"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(root), bits, f"worker-{bits}"],
            cwd=ROOT,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "PATH": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for bits in ("4", "8")
    ]
    for worker in workers:
        _, errors = worker.communicate()
        assert worker.returncode == 0, errors
    logs = [(root / f"log-worker-{bits}.txt").read_text() for bits in ("4", "8")]
    made = sum(log.count("sparsify") > 0 and "another worker" not in log for log in logs)
    assert len(list(root.glob("sparsify-*"))) == 1 and len(list(root.glob("quantize-*"))) == 2
    assert made == 1, logs
    assert not list(root.glob("*.claim-*")) and not list(root.glob("*.partial"))


@pytest.mark.slow
def test_shards_at_the_same_time_end_in_one_comparison(tmp_path):
    over = ("--over", "sparsify.sparsity=0.5,0.6", "--runs", str(tmp_path / "runs"))
    command = (SQFT, "sweep", "recipes/tiny.yaml", *QUICK, *over)
    shards = [
        subprocess.Popen(
            [*command, "--shard", f"{number}/2"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2)
    ]
    outputs = [shard.communicate() for shard in shards]
    assert [shard.returncode for shard in shards] == [0, 0], outputs
    assert any("comparison: " in out for out, _ in outputs), outputs
    assert (tmp_path / "runs" / "tiny" / "sweep" / "comparison.json").exists()


@pytest.mark.slow
def test_a_search_keeps_its_trials(tmp_path):
    """A second call with more trials runs only the missing ones."""
    over = ("--over", "sparsify.sparsity=0.5,0.6", "--runs", str(tmp_path / "runs"))
    goals = ("--search", "tpe", "--minimize", "size", "--maximize", "accuracy")
    command = (SQFT, "sweep", "recipes/tiny.yaml", *QUICK, *over, *goals)
    from sqft_export.run.trials import JOURNAL

    for trials in ("2", "3"):
        done = subprocess.run(
            [*command, "--trials", trials], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "best: sparsify.sparsity=0." in done.stdout
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    record = JournalStorage(JournalFileBackend(str(tmp_path / "runs" / "tiny" / "sweep" / JOURNAL)))
    (study,) = optuna.get_all_study_summaries(record)
    assert study.n_trials == 3


RAY_SETTINGS = (*QUICK, "adapt=none", "calibration.samples=64")


def ray_sweep(runs: Path, *over: str) -> subprocess.Popen:
    axes = [word for axis in over for word in ("--over", axis)]
    command = (SQFT, "sweep", "recipes/tiny.yaml", *RAY_SETTINGS, *axes, "--runs", str(runs))
    return subprocess.Popen(
        [*command, "--ray", "--threads", "1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(not installed("ray"), reason="Ray is not installed")
def test_a_sweep_on_ray_runs_each_pass_once_and_survives_a_kill(tmp_path):
    """A local cluster; the process of a quantize pass is killed and the pass runs again."""
    root = tmp_path / "runs" / "tiny"
    sweep = ray_sweep(tmp_path / "runs", "quantize.bits=4,8")
    deadline = time.monotonic() + 600
    while not (claims := list(root.glob("quantize-*.claim-1"))) and sweep.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert claims, sweep.communicate()
    with contextlib.suppress(ValueError, OSError):  # the claim is empty for a moment
        os.kill(json.loads(claims[0].read_text())["process"], signal.SIGKILL)
    out, errors = sweep.communicate()
    assert sweep.returncode == 0, errors
    assert "comparison: " in out
    names = [path.name.rpartition("-")[0] for path in root.glob("*-*") if path.is_dir()]
    assert names.count("sparsify") == 1 and names.count("quantize") == 2
    assert names.count("report") == 2
    table = errors[errors.rindex("pass  ") :].splitlines()
    assert len(table) == 1 + len(names), errors
    assert not list(root.glob("*.claim-*")) and not list(root.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.skipif(not installed("ray"), reason="Ray is not installed")
def test_a_failed_pass_on_ray_is_named_and_the_rest_is_finished(tmp_path):
    """A gate stops the combination with the higher sparsity."""
    sweep = ray_sweep(tmp_path / "runs", "sparsify.sparsity=0.3,0.95", "gates.kl=1.0")
    out, errors = sweep.communicate()
    assert sweep.returncode == 6, (out, errors)
    assert errors.splitlines()[-1].startswith("error: sparsify-")
    assert "skipped, a pass before it failed" in errors
    assert len(list((tmp_path / "runs" / "tiny").glob("report-*"))) == 1
