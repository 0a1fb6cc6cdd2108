"""Compile the OpenVINO extension and the plug-in for llama.cpp.

    python -m sqft_export.kernels.build

``make recipe`` and ``make test`` build them once. An extension runs only with the OpenVINO version
that it was built against; its file name contains that version. The plug-in needs no file of
llama.cpp, and one file serves all builds.
"""

import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from sqft_export.kernels.extension import HERE, extension_file
from sqft_export.kernels.llama_plugin import PLUGIN_FILE

SOURCES = (
    *("matrix.c", "plain.c", "avx2.c", "avx2_vnni.c", "avx512.c", "amx.c", "neon.c", "dispatch.c"),
)
EXTENSION = "openvino_op.cpp"
PLUGIN_SOURCES = ("ggml/plugin.cpp", "ggml/host.cpp", "ggml/weights.cpp")
# Without contraction to fused multiply-adds, all machines round activations in the same way.
FLAGS = ("-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wno-psabi")


def _run(command: list[str]) -> None:
    """Run a command.

    :raises RuntimeError: with the end of its stderr, if it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-2000:]}")


def build_extension(compiler: str = "g++") -> Path:
    """Compile the extension and return its path.

    :raises RuntimeError: naming a missing tool or library, or with the compiler's message.
    """
    out, openvino = extension_file(), find_spec("openvino")
    if out is None or openvino is None or openvino.origin is None:
        raise RuntimeError("OpenVINO is not installed")
    _require_compilers(compiler)
    home = Path(openvino.origin).parent
    libraries = sorted((home / "libs").glob("libopenvino.so.*"))
    threads = sorted((home / "libs").glob("libtbb.so.*"))
    if not libraries or not threads or not (home / "include/openvino/openvino.hpp").is_file():
        raise RuntimeError(f"{home}: headers or libraries of OpenVINO are missing")
    options = ("-I", str(home / "include"), str(libraries[0]), str(threads[0]))
    return _link(compiler, (EXTENSION,), (*options, "-Wl,-rpath,$ORIGIN/../../openvino/libs"), out)


def build_plugin(compiler: str = "g++") -> Path:
    """Compile the plug-in for llama.cpp and return its path.

    :raises RuntimeError: if something is missing (it is named), or with the compiler's message.
    """
    if sys.platform != "linux":
        raise RuntimeError("the plug-in for llama.cpp runs on Linux only")
    _require_compilers(compiler)
    options = ("-pthread", "-ldl", "-Wl,--no-undefined")
    return _link(compiler, PLUGIN_SOURCES, options, PLUGIN_FILE)


def _require_compilers(compiler: str) -> None:
    for name in (compiler, "gcc"):
        if shutil.which(name) is None:
            raise RuntimeError(f"the compiler {name} is not installed")


def _link(compiler: str, sources: tuple[str, ...], options: tuple[str, ...], out: Path) -> Path:
    """Compile C++ sources and the kernels to a shared library, and return its path.

    A rename publishes it, so it is never partial. It is never unloaded: objects that it made may
    outlive the program's last use of it.
    """
    with tempfile.TemporaryDirectory(dir=HERE) as scratch:
        objects = []
        for source in SOURCES:
            objects.append(str(Path(scratch) / f"{source}.o"))
            _run(["gcc", *FLAGS, "-c", str(HERE / source), "-o", objects[-1]])
        built = Path(scratch) / "built.so"
        paths = [str(HERE / source) for source in sources]
        shared = ("-std=c++17", *FLAGS, "-shared", "-Wl,-z,nodelete")
        _run([compiler, *shared, *paths, *objects, *options, "-o", str(built)])
        built.replace(out)
    return out


if __name__ == "__main__":
    # An error is not fatal: without these files, the runtimes' own kernels are used.
    for what, build in (("sparse execution", build_extension), ("the plug-in", build_plugin)):
        try:
            print(build())
        except RuntimeError as error:
            print(f"{what} is not available: {error}", file=sys.stderr)
