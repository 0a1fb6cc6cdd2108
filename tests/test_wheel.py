"""A wheel has the recipes and their data, and they work from any folder."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT

RECIPES = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))
SOURCES = ("sqft_export", "recipes", "data", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The content of a wheel; it is built without the C modules, which are optional."""
    root = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        extra = {"symlinks": True, "ignore": ignored} if (ROOT / name).is_dir() else {}
        copy(ROOT / name, root / "source" / name, **extra)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--wheel-dir", str(root), str(root / "source")],
        env=os.environ | {"CC": "false"},
        check=True,
    )
    (wheel,) = root.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(root / "installed")
    return root / "installed"


def sqft(installed: Path, folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sqft_export.cli", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_recipes_are_listed_from_any_folder(installed):
    listed = json.loads(sqft(installed, Path("/"), "list", "recipes", "--json"))
    assert [entry["recipe"] for entry in listed] == RECIPES
    assert all(entry["about"] for entry in listed)


@pytest.mark.parametrize("name", ["tiny", "mistral", "stories"])
def test_a_recipe_is_planned_by_its_name(installed, tmp_path, name):
    (tmp_path / "tiny").mkdir()  # a folder of that name is no recipe
    document = json.loads(sqft(installed, tmp_path, "plan", name, "--json"))
    assert document["recipe"] == name and document["passes"]


def test_every_recipe_finds_its_data(installed):
    code = (
        "from pathlib import Path\n"
        "from sqft_export.recipe.builtin import builtin_recipes\n"
        "from sqft_export.recipe.load import load_recipe\n"
        "for name in builtin_recipes():\n"
        "    recipe = load_recipe(Path(name))\n"
        "    task = recipe.task.model_dump()\n"
        "    for field in ('train', 'test', 'text', 'folder'):\n"
        "        if task.get(field):\n"
        "            place = recipe.resolve(task[field])\n"
        "            assert place.exists() and str(place).startswith(SITE), place\n"
    )
    command = [sys.executable, "-P", "-c", f"SITE = {str(installed)!r}\n{code}"]
    subprocess.run(command, cwd="/", env=os.environ | {"PYTHONPATH": str(installed)}, check=True)
