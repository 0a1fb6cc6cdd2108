"""`make recipe` installs the build of torch that is requested, once."""

import os
import shutil
import subprocess
from pathlib import Path

from conftest import ROOT

FILES = ("Makefile", "pyproject.toml", "constraints.txt")
SOURCES = ("sqft_export/packed/unpack.c", "sqft_export/numerics/fused.c")


def project(root: Path) -> Path:
    """A copy of the files of a fresh clone that the Makefile reads."""
    for name in (*FILES, *SOURCES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)
    return root


def commands(root: Path, *words: str) -> str:
    """What `make` would run."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCH", "MAKE"))}
    command = ["make", "-n", "recipe", *words]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def mark(root: Path, *words: str) -> None:
    """Mark the environment as installed, as the last command of an install does."""
    touched = [c for c in commands(root, *words).splitlines() if c.startswith("touch ")]
    (root / ".venv").mkdir(exist_ok=True)
    subprocess.run(["bash", "-ec", touched[0]], cwd=root, check=True)


def test_a_gpu_build_does_not_see_the_index_of_cpu_builds(tmp_path):
    printed = commands(project(tmp_path), "TORCH=torch==2.13.0")
    assert '"torch==2.13.0"' in printed and "whl/cpu" not in printed
    assert "whl/cpu" in commands(tmp_path, "TORCH=torch==2.13.0+cpu")


def test_an_install_is_done_once(tmp_path):
    mark(project(tmp_path))
    assert commands(tmp_path).strip() == ".venv/bin/sqft-export run recipes/tiny.yaml"


def test_another_build_of_torch_replaces_the_first(tmp_path):
    mark(project(tmp_path), "TORCH=torch==2.13.0+cpu")
    printed = commands(tmp_path, "TORCH=torch==2.13.0")
    assert "uninstall --quiet --yes torch" in printed and '"torch==2.13.0"' in printed
    assert "rm -f .venv/installed" in printed, "the first build's mark goes"
