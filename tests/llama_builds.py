"""Build llama.cpp from the source package of llama-cpp-python, once, outside the clone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
# Kept between runs; SQFT_LLAMA_BUILDS selects another folder.
FOLDER = Path(os.environ.get("SQFT_LLAMA_BUILDS", "~/.cache/sqft-export-tests")).expanduser()
OPTIONS = (
    *("-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF"),
    *("-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_COMMON=OFF", "-DLLAMA_CURL=OFF"),
)
# The CPU backend linked in, or one library per instruction set as in llama.cpp's releases.
FORMS = {
    "shared": (("-DGGML_NATIVE=ON",), ("llama", "ggml")),
    "dynamic": (
        ("-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON"),
        ("ggml", "ggml-cpu-x64", "ggml-cpu-haswell"),
    ),
}


def missing_tools() -> str:
    """Return the tools that a build lacks, or an empty text."""
    return ", ".join(name for name in ("g++", "cmake", "ninja") if shutil.which(name) is None)


def source() -> Path:
    """Return the unpacked source package."""
    found = FOLDER / f"llama_cpp_python-{VERSION}"
    if not found.is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run(
            [*pip, "--no-binary", ":all:", f"{PACKAGE}=={VERSION}", "-d", FOLDER], check=True
        )
        (archive,) = FOLDER.glob("llama_cpp_python-*.tar.gz")
        shutil.unpack_archive(archive, FOLDER, filter="data")
    return found


def build(form: str) -> Path:
    """Return the folder with the libraries of a form; four to ten minutes the first time."""
    options, targets = FORMS[form]
    tree = FOLDER / f"{form}-{VERSION}"
    if not (tree / "finished").exists():
        vendored = source() / "vendor" / "llama.cpp"
        subprocess.run(["cmake", "-S", vendored, "-B", tree, *OPTIONS, *options], check=True)
        subprocess.run(["cmake", "--build", tree, "--target", *targets], check=True)
        (tree / "finished").touch()
    return tree / "bin"


def binding() -> Path:
    """Return a folder that has the Python package ``llama_cpp`` and what it imports."""
    site = FOLDER / "site"
    if not site.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", site, "diskcache"], check=True)
        shutil.copytree(source() / "llama_cpp", site / "llama_cpp")
    return site


def environment(form: str) -> dict[str, str]:
    """Return the variables by which ``import llama_cpp`` finds a build."""
    libraries = build(form)
    found = {
        "LLAMA_CPP_LIB_PATH": str(libraries),
        "PYTHONPATH": os.pathsep.join([str(binding()), os.environ.get("PYTHONPATH", "")]),
    }
    if form == "dynamic":  # libllama.so of the other form, with this form's ggml
        shutil.copy(build("shared") / "libllama.so", libraries)
        found["LD_LIBRARY_PATH"] = str(libraries)
    return found
