"""Systems without POSIX modules: plan, inspect, list, benchmark and the loaders start there.

No Windows or macOS machine runs these tests. They run a process in which the package finds no POSIX
modules and functions; /proc and the runtimes remain those of this system.
"""

import ast
import json
import subprocess
import sys

from conftest import ROOT

PACKAGE = ROOT / "sqft_export"
POSIX_MODULES = {"fcntl", "resource", "termios", "pwd", "grp", "pty"}
WITHOUT_POSIX = """
import builtins, os, types
from pathlib import Path
import_module = builtins.__import__
def import_portable(name, scope=None, *rest, **named):
    if name in {"fcntl", "resource"} and (scope or {}).get("__name__", "").startswith("sqft_"):
        raise ImportError(name)
    return import_module(name, scope, *rest, **named)
builtins.__import__ = import_portable
for name in ("sched_getaffinity", "sched_setaffinity", "O_NONBLOCK", "O_CLOEXEC"):
    delattr(os, name)
import sqft_export.machine.counters, sqft_export.machine.limits, sqft_export.machine.processors
sqft_export.machine.processors.STAT = Path("missing")
windows = types.SimpleNamespace(platform="win32")
sqft_export.machine.counters.sys = sqft_export.machine.limits.sys = windows
from sqft_export.cli import main
"""


def run_without_posix(*words: str, before: str = "main()") -> subprocess.CompletedProcess:
    """The command line in a process without POSIX modules and functions."""
    code = WITHOUT_POSIX + before
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_no_module_imports_posix_modules_at_its_top():
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{file.name}: {name}" for name in names if name in POSIX_MODULES]
    assert not found


def test_plan_and_list_work_without_posix_modules():
    for words in (["plan", "recipes/tiny.yaml"], ["list", "targets"], ["--help"]):
        done = run_without_posix(*words)
        assert done.returncode == 0, done.stderr


def test_a_deployment_is_inspected_loaded_and_measured_without_posix_modules(tiny_run, tmp_path):
    folder = str(tiny_run["export-onnx"].path / "model")
    done = run_without_posix("inspect", folder)
    assert done.returncode == 0, done.stderr
    load = f"import sqft_export; print(type(sqft_export.load_onnx({folder!r})).__name__)"
    done = run_without_posix(before=load)
    assert (done.returncode, done.stdout.strip()) == (0, "InferenceSession"), done.stderr
    small = ["--prompt-tokens", "4", "--new-tokens", "2", "--rounds", "1", "--batch", "1"]
    done = run_without_posix("benchmark", folder, *small, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
