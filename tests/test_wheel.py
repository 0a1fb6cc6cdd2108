"""A pure wheel has the recipes and their data, and works from any folder and without C modules."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT

RECIPES = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))
SOURCES = ("sqft_export", "recipes", "data", "pyproject.toml", "README.md", "LICENSE", "setup.py")
C_MODULES = sorted((ROOT / "sqft_export").rglob("*.c"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The content of the wheel for any system, built in a folder that has compiled libraries."""
    root = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        extra = {"symlinks": True, "ignore": ignored} if (ROOT / name).is_dir() else {}
        copy(ROOT / name, root / "source" / name, **extra)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--wheel-dir", str(root), str(root / "source")],
        env=os.environ | {"SQFT_PURE": "1", "CC": "false"},
        check=True,
    )
    (wheel,) = root.glob("*-py3-none-any.whl")
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


def python(installed: Path, code: str) -> str:
    """Run code with the installed package, from a folder outside of the project."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_pure_wheel_has_no_compiled_file(installed):
    assert not [file for file in installed.rglob("*") if file.suffix in (".so", ".pyd", ".o")]
    info = next(installed.glob("*.dist-info"))
    assert "Root-Is-Purelib: true" in (info / "WHEEL").read_text()
    found = python(installed, "import sqft_export.kernels.library as l; print(l.find_kernels())")
    assert found.strip() == "None"


def test_deployments_are_inspected_and_loaded_without_c_modules(installed, tiny_run, tmp_path):
    """Packed weights are inflated by numpy; a folder on our kernels names the missing part."""
    question = "Question: What is 2 plus 3?\nAnswer:"
    for target in ("openvino", "onnx", "gguf"):
        artifact = tiny_run[f"export-{target}"].path
        answers = set()
        for form in ("model", "packed"):
            folder = artifact / form
            assert target in sqft(installed, tmp_path, "inspect", str(folder)).lower()
            code = "import sys, sqft_export; assert sqft_export.__file__.startswith({!r})\n"
            code += "print(sqft_export.load({!r}).generate({!r}, 4))"
            answers.add(python(installed, code.format(str(installed), str(folder), question)))
        assert len(answers) == 1 and answers != {"\n"}
    sparse = str(tiny_run["export-openvino"].path / "sparse")
    code = f"import sqft_export; sqft_export.load({sparse!r}).generate('a', 1)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert "the package was installed without a compiler" in done.stderr


def test_the_sources_build_the_same_package(tmp_path):
    """The source distribution has every file of the wheel, and the C files and headers."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        extra = {"symlinks": True, "ignore": ignored} if (ROOT / name).is_dir() else {}
        copy(ROOT / name, tmp_path / "source" / name, **extra)
    code = "from setuptools import build_meta; build_meta.build_sdist('.')"
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "source", check=True, capture_output=True
    )
    (archive,) = (tmp_path / "source").glob("sqft_export-*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    expected = [
        file
        for file in (tmp_path / "source" / "sqft_export").rglob("*")
        if file.suffix in (".py", ".c", ".h", ".cpp", ".yaml", ".jsonl", ".json", ".typed", ".html")
    ]
    assert len(expected) > 200
    missing = [f for f in expected if str(f.relative_to(tmp_path / "source")) not in names]
    assert not missing and "setup.py" in names


@pytest.mark.parametrize("target", ["aarch64-linux-gnu.2.17", "aarch64-macos"])
def test_c_modules_compile_for_aarch64(target, tmp_path):
    """With clang of the package ziglang, where it is installed; the result is not run here."""
    pytest.importorskip("ziglang")
    cache = {f"ZIG_{name}_CACHE_DIR": str(tmp_path / "cache") for name in ("GLOBAL", "LOCAL")}
    flags = ["-O3", "-ffp-contract=off", "-fPIC", "-Wall", "-Werror"]
    for source in C_MODULES:
        compiled = tmp_path / f"{source.stem}.o"
        command = [sys.executable, "-m", "ziglang", "cc", "-target", target, *flags]
        subprocess.run([*command, "-c", source, "-o", compiled], env=os.environ | cache, check=True)
    assert {"neon", "dispatch", "fused", "unpack"} <= {file.stem for file in tmp_path.glob("*.o")}


def test_recipes_are_listed_from_any_folder(installed):
    listed = json.loads(sqft(installed, Path("/"), "list", "recipes", "--json"))
    assert [entry["recipe"] for entry in listed] == RECIPES
    assert all(entry["about"] for entry in listed)


@pytest.mark.parametrize(
    "name", ["tiny", "mistral", pytest.param("stories", marks=pytest.mark.slow)]
)
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
