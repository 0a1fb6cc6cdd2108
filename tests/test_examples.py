"""The notebooks of `examples/` run from the first cell to the last."""

import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def cells_of(notebook) -> list[str]:
    document = json.loads(notebook.read_text())
    assert document["nbformat"] == 4
    cells = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    return ["".join(cell["source"]) for cell in cells]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs(notebook, tmp_path):
    """All cells in one interpreter, as a kernel executes them."""
    code = (
        "cells = " + repr(cells_of(notebook)) + "\nfor cell in cells:\n    exec(cell, globals())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "certificate passed: True" in done.stdout
    assert "tokens per second" in done.stdout.splitlines()[-1]
