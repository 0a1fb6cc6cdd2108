"""Our kernels in an unmodified llama.cpp: the plug-in's file, a check of a build, and loading it.

The plug-in comes from the installed package, never from a deployment. Its sources are in ``ggml/``.
"""

import ctypes
import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sqft_export.errors import UserError, one_line
from sqft_export.libraries.xllamacpp import extension_module

PLUGIN_FILE = Path(__file__).parent / "libsqft-ggml.so"
BACKEND_VARIABLE, PRELOAD_VARIABLE = "GGML_BACKEND_PATH", "LD_PRELOAD"
CHECK_SECONDS = 60
INSTALL = (
    "pip install 'sqft-export[serve]' has wheels (xllamacpp, built for AVX2); pip install "
    "'sqft-export[llama-cpp]' compiles llama.cpp for this processor"
)
_ANSWER = "sqft-check: "
_LOAD_AND_CHECK = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
if not hasattr(library, "ggml_backend_load"):
    sys.exit("it shows no ggml_backend_load: a static build, or not libggml.so or libllama.so")
library.ggml_backend_load(sys.argv[2].encode())
"""


@dataclass(frozen=True)
class BuildCheck:
    """Whether the plug-in supports a build of llama.cpp.

    supported: whether our kernels run in it.
    reason: why not; empty if supported.
    variable: the environment variable that loads the plug-in into it.
    gpu: whether llama.cpp puts weights into a GPU's pinned memory first, unless it is started with
        ``--no-host``.
    ggml, kernels: version of ggml, and our instruction set on this machine; may be empty.
    """

    supported: bool
    reason: str
    variable: str = BACKEND_VARIABLE
    gpu: bool = False
    ggml: str = ""
    kernels: str = ""


def require_plugin() -> Path:
    """Return the path of the plug-in.

    :raises UserError: if it was not built.
    """
    if not PLUGIN_FILE.is_file():
        helps = "python -m sqft_export.kernels.build makes it, with gcc and g++ on Linux"
        raise UserError(f"{PLUGIN_FILE.name} is missing; {helps}")
    return PLUGIN_FILE


def environment_line(variable: str = BACKEND_VARIABLE) -> str:
    """Return what to write before a command of llama.cpp."""
    return f"{variable}={require_plugin()}"


def check_build(build: Path) -> BuildCheck:
    """Load the plug-in into a program or shared library of llama.cpp, in a separate process.

    A program is started with ``--version``, and ends before its own code runs.

    :param build: a program such as ``llama-server``, or ``libggml.so`` or ``libllama.so``.
    :raises UserError: if there is no such file, or it can't be started.
    """
    plugin = require_plugin()
    if not build.is_file():
        raise UserError(f"--check: {one_line(build)}: no such file")
    build = build.resolve()
    environment = os.environ | {"SQFT_GGML": "check"}
    if ".so" in build.name:
        command = [sys.executable, "-c", _LOAD_AND_CHECK, str(build), str(plugin)]
    else:
        command = [str(build), "--version"]
        environment |= {PRELOAD_VARIABLE: str(plugin)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, timeout=CHECK_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--check: {one_line(build)}: {one_line(error)}") from error
    return _read_answer(done.stderr.decode(errors="replace"))


def _read_answer(text: str) -> BuildCheck:
    """Return the plug-in's answer, which is one line of a program's stderr."""
    lines = [line for line in text.splitlines() if line.startswith(_ANSWER)]
    if not lines:
        last = one_line(text.strip().splitlines()[-1]) if text.strip() else "no message"
        return BuildCheck(False, f"the plug-in can't be loaded into it: {last}")
    answer = json.loads(lines[-1].removeprefix(_ANSWER))
    return BuildCheck(
        supported=answer["supported"],
        reason=answer["reason"],
        variable=PRELOAD_VARIABLE if answer["linked_in"] else BACKEND_VARIABLE,
        gpu=answer["gpu"],
        ggml=answer["ggml"],
        kernels=answer["kernels"],
    )


@dataclass(frozen=True)
class SharedBuild:
    """A llama.cpp of an installed Python package, whose functions are visible.

    package: its distribution.
    library: the file that contains or loads ggml.
    """

    package: str
    library: Path


def _llama_cpp_library() -> Path | None:
    """Return llama-cpp-python's ``libggml.so``, which may be missing; None if not installed."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")  # which llama-cpp-python reads too
    return Path(folder or Path(spec.origin).parent / "lib") / "libggml.so"


def find_shared_build(*packages: str) -> SharedBuild | None:
    """Return the first llama.cpp that our kernels may run in; None if no package has one.

    llama-cpp-python is compiled by its users for their processor, so it goes first. The wheels of
    xllamacpp are built for AVX2.

    :param packages: distributions to look for; default: both.
    """
    finders = {"llama-cpp-python": _llama_cpp_library, "xllamacpp": extension_module}
    for package in packages or finders:
        if (library := finders[package]()) is not None:
            return SharedBuild(package, library)
    return None


def why_not_in_llama_cpp(*packages: str) -> str | None:
    """Return in a few words why our kernels can't run in llama.cpp here; None if they can.

    :param packages: see :func:`find_shared_build`.
    """
    if not PLUGIN_FILE.is_file():
        return f"{PLUGIN_FILE.name} is missing; python -m sqft_export.kernels.build makes it"
    build = find_shared_build(*packages)
    if build is None:
        return f"no llama.cpp with visible functions is installed; {INSTALL}"
    if not build.library.is_file():
        return f"{build.library} is missing: this {build.package} has no shared libraries"
    found = _check_once(build.library)
    return None if found.supported else f"{build.package}: {found.reason}"


_check_once = functools.cache(check_build)


@functools.cache
def use_in_llama_cpp(form: str = "auto") -> None:
    """Load the plug-in into the installed llama-cpp-python or xllamacpp, before any model.

    Models that are loaded later have their Q4_0, Q4_1 and Q8_0 weights on our kernels.

    :param form: auto: leave out zeros where that costs no time on this processor; dense: never;
        sparse: always. The environment variable ``SQFT_FORM`` goes before it.
    :raises UserError: if neither is installed, or its llama.cpp is not supported.
    """
    plugin, build = require_plugin(), find_shared_build()
    if build is None:
        raise UserError(f"no llama.cpp with visible functions is installed; {INSTALL}")
    if build.package == "llama-cpp-python":
        import llama_cpp  # noqa: F401  # loads its libraries, in its own way
    if not build.library.is_file():
        raise UserError(f"{build.library} is missing: this {build.package} has no shared libraries")
    os.environ.setdefault("SQFT_FORM", form)
    load_plugin(build.library, plugin)


def load_plugin(library: Path, plugin: Path) -> None:
    """Load the plug-in into a ggml of this process.

    :param library: ``libggml.so``, or a library that contains ggml.
    :raises UserError: if it is not supported, with the plug-in's reason.
    """
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    if ggml.ggml_backend_load(str(plugin).encode()):
        return
    reason = ctypes.CDLL(str(plugin)).sqft_ggml_reason
    reason.restype = ctypes.c_char_p
    raise UserError(f"{library}: our kernels are not used: {reason().decode(errors='replace')}")


def set_exact_products(exact: bool) -> None:
    """Let our kernels in llama.cpp multiply float32 activations, or rounded ones, from now on.

    It holds for all models of this process. ``SQFT_EXACT`` is the value at the start.
    """
    ctypes.CDLL(str(require_plugin())).sqft_ggml_set_exact(exact)
