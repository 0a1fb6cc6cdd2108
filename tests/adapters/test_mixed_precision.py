"""Accelerate's mixed precision, from its config or a launcher: ``adapt.precision`` decides."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, random_model

TRAIN = """
from pathlib import Path
from conftest import small_recipe
from sqft_export.run.pipeline import run_recipe
settings = ("adapt.steps=2", "adapt.batch=2", "adapt.ranks=[8, 4]", "quantize.method=rtn",
            "sparsify={method: magnitude, sparsity: 0.5}")
recipe = small_recipe(*settings, model_path=Path(MODEL))
print(run_recipe(recipe, Path(ROOT), ("adapt",))["adapt"].path)
"""


@pytest.mark.parametrize("variable", ["bf16", "no"])
def test_the_recipe_decides_whatever_a_launcher_sets(tmp_path, variable):
    model = random_model(tmp_path / "model")
    code = TRAIN.replace("MODEL", repr(str(model))).replace("ROOT", repr(str(tmp_path / variable)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {"ACCELERATE_MIXED_PRECISION": variable, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads((Path(done.stdout.strip()) / "manifest.json").read_text())
    assert manifest["metrics"]["precision"] == "float32"
