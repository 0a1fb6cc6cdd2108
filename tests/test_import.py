"""`import sqft_export` and a loaded deployment change nothing for the rest of the process."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from sqft_export.telemetry import TELEMETRY_VARIABLES

# What is compared: modules that can't be imported, variables, levels and handlers of all loggers,
# settings of matplotlib and numpy.
STATE = """
import json, logging, os, sys
import matplotlib, numpy, optuna

def state():
    loggers = [logging.root, *map(logging.getLogger, sorted(KNOWN))]
    return json.dumps([
        sorted(name for name, module in sys.modules.items() if module is None),
        dict(os.environ),
        [(one.name, one.level, len(one.handlers), one.disabled) for one in loggers],
        logging.root.manager.disable,
        {name: str(value) for name, value in matplotlib.rcParams.items()},
        numpy.get_printoptions(), numpy.geterr(),
    ], default=str)

def changes(before):
    pairs = zip(json.loads(before), json.loads(state()), strict=True)
    return [(one, other) for one, other in pairs if one != other]
"""
IMPORTS = """
import importlib, pkgutil, sqft_export
for found in pkgutil.walk_packages(sqft_export.__path__, "sqft_export."):
    name = found.name.rpartition(".")[2]  # libsqft-ggml.so is no module
    if name.isidentifier() and name not in ("_fused", "_unpack", "_kernels", "pretrain"):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:  # an extra that is not installed
            assert not error.name.startswith("sqft_export"), error
"""


def run(code: str) -> str:
    """Output of code in a fresh process without the variables that the test process has set."""
    kept = {k: v for k, v in os.environ.items() if k not in TELEMETRY_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_importing_the_package_changes_nothing():
    run("import sys, sqft_export\nassert not {'torch', 'openvino'} & set(sys.modules)")
    run(
        f"KNOWN = ['gguf']\n{STATE}\nbefore = state()\nimport sqft_export\nassert state() == before"
    )


def test_importing_every_module_changes_no_logger_and_hides_no_module():
    """Libraries that modules import set up themselves, so they are imported first."""
    libraries = (
        "import gguf, nncf, openvino, onnxruntime, onnxruntime_genai, peft, transformers, torch\n"
        "import optimum.exporters.openvino, optimum.intel, accelerate, datasets, onnx_ir\n"
        "from transformers import Trainer\n"
        "from onnxruntime_genai.models import builder\n"
    )
    code = f"{STATE}\nbefore = state()\n{IMPORTS}\n"
    unchanged = "assert state() == before, changes(before)"
    run(f"KNOWN = ['gguf', 'optuna', 'nncf']\n{libraries}{code}{unchanged}")


@pytest.mark.parametrize(
    ("code", "unneeded"),
    [
        ("import sqft_export.run.pipeline, sqft_export.run.preview", {"transformers", "peft"}),
        (
            "from pathlib import Path\n"
            "from sqft_export.measure.jobs import MeasuredModel\n"
            "from sqft_export.measure.worker import open_measured\n"
            "model = {'kind': 'torch', 'folder': Path(MODEL), 'threads': 1, 'device': 'cpu'}\n"
            "open_measured(MeasuredModel(**model))",
            {"peft", "datasets", "sklearn"},
        ),
    ],
    ids=["checks", "a torch row"],
)
def test_libraries_that_take_seconds_are_imported_where_they_are_needed(
    random_llama, code, unneeded
):
    found = f"import sys\nassert not {unneeded} & set(sys.modules), {unneeded} & set(sys.modules)"
    run(f"MODEL = {str(random_llama)!r}\n{code}\n{found}")


def test_loading_a_deployment_changes_nothing(tiny_run):
    folder = tiny_run["export-openvino"].path
    code = (
        "KNOWN = ['gguf', 'openvino']\nimport openvino, onnxruntime\n"
        f"{STATE}\nbefore = state()\nimport sqft_export\n"
        f"sqft_export.load_openvino({str(folder / 'packed')!r})\n"
        f"sqft_export.load_openvino({str(folder / 'model')!r})\n"
        f"sqft_export.load_onnx({str(tiny_run['export-onnx'].path / 'packed')!r})\n"
        "assert state() == before, changes(before)"
    )
    assert not run(code).strip()


SEEN = (
    "import os, sys, openvino.tools.ovc, nncf\n"
    "assert 'openvino_telemetry.main' not in sys.modules\n"
    f"assert set({sorted(TELEMETRY_VARIABLES)}) <= set(os.environ)\n"
    "print('seen')\n"
)
AT_EXIT = f"import atexit, runpy, sys\natexit.register(lambda: exec({SEEN!r}, {{}}))\n"


def test_commands_switch_telemetry_off():
    command = "sys.argv = ['sqft-export', 'list', 'recipes']\nfrom sqft_export.cli import main\n"
    assert "seen\n" in run(f"{AT_EXIT}{command}main()")


def test_workers_switch_telemetry_off(tiny_run, tmp_path):
    folder = str(tiny_run["export-openvino"].path / "model")
    model = {"kind": "openvino", "folder": folder, "threads": 1, "device": "cpu"}
    job = {"model": model, "requests": {}, "parent": os.getpid()}
    (tmp_path / "job.json").write_text(json.dumps(job))
    arguments = ["worker", str(tmp_path / "job.json"), str(tmp_path / "result.json")]
    start = "runpy.run_module('sqft_export.measure.worker', run_name='__main__')\n"
    assert "seen\n" in run(f"{AT_EXIT}sys.argv = {arguments}\n{start}")


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime_genai"])
def test_libraries_read_a_variable_of_ours(name):
    """A release that renames it fails here."""
    folder = Path(importlib.util.find_spec(name).origin).parent
    found = [file for file in folder.rglob("lib*.so*") if b"TELEMETRY" in file.read_bytes()]
    for file in found:
        assert any(variable.encode() in file.read_bytes() for variable in TELEMETRY_VARIABLES)
    assert found, f"{name} has no telemetry any more; see sqft_export/telemetry.py"
