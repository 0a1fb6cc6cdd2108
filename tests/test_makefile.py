"""`make recipe` installs the build of torch that is requested, once."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
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
    assert '"torch===2.13.0"' in printed and "whl/cpu" not in printed
    printed = commands(tmp_path, "TORCH=torch==2.13.0+cpu")
    assert '"torch==2.13.0+cpu"' in printed and "whl/cpu" in printed


def test_an_install_is_done_once(tmp_path):
    mark(project(tmp_path))
    assert commands(tmp_path).strip() == ".venv/bin/sqft-export run recipes/tiny.yaml"


def test_another_build_of_torch_replaces_the_first(tmp_path):
    mark(project(tmp_path), "TORCH=torch==2.13.0+cpu")
    printed = commands(tmp_path, "TORCH=torch==2.13.0")
    assert "uninstall --quiet --yes torch" in printed and '"torch===2.13.0"' in printed
    assert "rm -f .venv/installed" in printed, "the first build's mark goes"


def test_a_cpu_build_of_the_same_version_is_no_gpu_build(tmp_path):
    """Where pip finds both, by pip itself: a folder of wheels stands for the user's indexes."""
    for version in ("2.13.0", "2.13.0+cpu"):
        info = f"torch-{version}.dist-info"
        with zipfile.ZipFile(tmp_path / f"torch-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    for requested in ("torch==2.13.0", "torch==2.13.0+cpu"):
        printed = commands(project(tmp_path), f"TORCH={requested}")
        wanted = re.search(r'--no-deps.* "(torch[^"]*)"', printed)[1]
        pip = [sys.executable, "-m", "pip", "install", "--isolated", "--no-index", "--no-deps"]
        command = [*pip, "--dry-run", "--ignore-installed", "--find-links", str(tmp_path), wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert f"Would install torch-{requested.removeprefix('torch==')}\n" in done.stdout
