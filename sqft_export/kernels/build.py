"""Compile the OpenVINO extension against the OpenVINO that is installed.

    python -m sqft_export.kernels.build

``make recipe`` and ``make test`` build it once. An extension runs only with the OpenVINO version
that it was built against; its file name contains that version.
"""

import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from sqft_export.kernels.extension import HERE, extension_file

SOURCES = (
    *("matrix.c", "plain.c", "avx2.c", "avx2_vnni.c", "avx512.c", "amx.c", "neon.c", "dispatch.c"),
)
EXTENSION = "openvino_op.cpp"
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
    """Compile the extension, move it to its final path, and return that path.

    :raises RuntimeError: naming a missing tool or library, or with the compiler's message.
    """
    out, openvino = extension_file(), find_spec("openvino")
    if out is None or openvino is None or openvino.origin is None:
        raise RuntimeError("OpenVINO is not installed")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"the compiler {compiler} is not installed")
    home = Path(openvino.origin).parent
    libraries = sorted((home / "libs").glob("libopenvino.so.*"))
    threads = sorted((home / "libs").glob("libtbb.so.*"))
    if not libraries or not threads or not (home / "include/openvino/openvino.hpp").is_file():
        raise RuntimeError(f"{home}: headers or libraries of OpenVINO are missing")
    with tempfile.TemporaryDirectory(dir=HERE) as scratch:
        objects = []
        for source in SOURCES:
            objects.append(str(Path(scratch) / f"{source}.o"))
            _run(["gcc", *FLAGS, "-c", str(HERE / source), "-o", objects[-1]])
        built = Path(scratch) / "built.so"
        _run(
            [
                *(compiler, "-std=c++17", *FLAGS, "-shared", str(HERE / EXTENSION), *objects),
                *("-I", str(home / "include"), str(libraries[0]), str(threads[0])),
                # Never unload it: graph nodes may outlive the core that loaded the library.
                *("-Wl,-z,nodelete", "-Wl,-rpath,$ORIGIN/../../openvino/libs", "-o", str(built)),
            ]
        )
        built.replace(out)
    return out


if __name__ == "__main__":
    try:
        print(build_extension())
    except RuntimeError as error:
        # Not fatal: without the extension, the runtime's own kernels are used.
        print(f"sparse execution is not available: {error}", file=sys.stderr)
