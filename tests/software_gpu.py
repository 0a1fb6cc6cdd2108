"""Environments in which GPU runtimes compute on the CPU; see tests/install_software_gpu.sh."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT

INSTALLED = ROOT / ".software-gpu"
LAVAPIPE = INSTALLED / "lavapipe.json"
SWIFTSHADER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")
LIBRARIES = INSTALLED / "driver" / "usr" / "lib" / f"{platform.machine()}-linux-gnu"


def require(what: str, *files: Path) -> None:
    """Skip a test if a file is missing, with the name of the package that has it."""
    if not all(file.exists() for file in files):
        pytest.skip(f"{what} is not installed; tests/install_software_gpu.sh installs it")


def environment(packages: str, driver: Path | str) -> dict[str, str]:
    """The environment of a process with other runtimes and a Vulkan driver.

    packages: a folder below ``.software-gpu``.
    driver: the JSON file of a driver; a missing one stands for a machine without a GPU.
    """
    path = os.pathsep.join([str(INSTALLED / packages), str(ROOT)])
    libraries = os.pathsep.join(filter(None, [str(LIBRARIES), os.environ.get("LD_LIBRARY_PATH")]))
    drivers = dict.fromkeys(("VK_DRIVER_FILES", "VK_ICD_FILENAMES"), str(driver))
    return os.environ | drivers | {"PYTHONPATH": path, "LD_LIBRARY_PATH": libraries}


def llama_environment(driver: Path | str = LAVAPIPE) -> dict[str, str]:
    """llama.cpp with Vulkan; a driver that computes on the CPU is used only if it is named."""
    require("cyllama-vulkan", INSTALLED / "llama" / "cyllama")
    require("Debian's package mesa-vulkan-drivers", LAVAPIPE, LIBRARIES / "libvulkan.so.1")
    return environment("llama", driver) | {"GGML_VK_VISIBLE_DEVICES": "0"}


def onnx_environment(folder: Path, driver: Path | str = SWIFTSHADER) -> dict[str, str]:
    """ONNX Runtime with WebGPU on SwiftShader, which Debian's Chromium has.

    folder: a folder that may be written.
    """
    require("onnxruntime-webgpu", INSTALLED / "onnx" / "onnxruntime")
    require("Debian's package chromium", SWIFTSHADER)
    require("Debian's package libvulkan1", LIBRARIES / "libvulkan.so.1")
    return environment("onnx", driver) | {"XDG_RUNTIME_DIR": str(folder)}


def failing_vulkan(folder: Path, calls: str) -> dict[str, str]:
    """Variables by which programs load a Vulkan loader that fails, built into a folder.

    calls: see ``failing_vulkan.c``.
    """
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed")
    source, library = ROOT / "tests" / "failing_vulkan.c", folder / "libvulkan.so.1"
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True)
    libraries = os.pathsep.join([str(folder), str(LIBRARIES)])
    real = str(LIBRARIES / "libvulkan.so.1")
    return {"LD_LIBRARY_PATH": libraries, "REAL_VULKAN": real, "FAILING_CALLS": calls}
