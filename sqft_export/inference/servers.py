"""Servers with an OpenAI-compatible interface for deployments. Only existing ones are started.

GGUF      llama-server, llama.cpp's own; the package xllamacpp holds the same server; the server of
          llama-cpp-python
OpenVINO  OpenVINO Model Server
ONNX      none that loads a folder of ONNX Runtime GenAI

The server of cyllama is left out: it renders messages without the chat template, and it does not
stream.
"""

import logging
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from sqft_export.errors import UserError
from sqft_export.inference.locate import Deployment
from sqft_export.inference.xllamacpp_server import KERNELS_VARIABLE
from sqft_export.kernels.choice import STOCK
from sqft_export.kernels.llama_plugin import PLUGIN_FILE, check_build, why_not_in_llama_cpp
from sqft_export.machine.host import installed
from sqft_export.packed.execution import resolve_execution
from sqft_export.packed.loaders import dense_gguf
from sqft_export.packed.usage import form_of
from sqft_export.targets.folder import kind_of

_logger = logging.getLogger(__name__)
SERVED_KINDS = ("gguf", "openvino")
NO_KERNELS = "it has its own; specialized folders and sqft_export.load run on ours"
NO_SERVER = {
    "onnx": "no server loads a folder of ONNX Runtime GenAI; serve the OpenVINO or the GGUF "
    "deployment of the same run",
    "web": "its model runs in the browser; --web shows the page",
}


@dataclass(frozen=True)
class Address:
    """Where a server listens, and the name under which it offers the model."""

    host: str
    port: int
    model: str

    @property
    def url(self) -> str:
        """Return the base URL for OpenAI clients."""
        return f"http://{self.host}:{self.port}/v1"


@dataclass(frozen=True)
class Server:
    """A server program.

    command: model file or folder, and address -> words of the command.
    here: whether it is installed.
    install: how to install it.
    kernels: how it runs our kernels; None if it can't.
    """

    name: str
    command: Callable[[Path, Address], list[str]]
    here: Callable[[], bool]
    install: str
    kernels: "Callable[[], KernelsStart] | None" = None


@dataclass(frozen=True)
class KernelsStart:
    """What starts a server on our kernels.

    variables: to add to the environment. options: to add to the command.
    missing: why our kernels can't run in it; None if they can.
    """

    variables: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    missing: str | None = None


def _llama_server(file: Path, at: Address) -> list[str]:
    place = ["--host", at.host, "--port", str(at.port), "--alias", at.model]
    return ["llama-server", "-m", str(file), "--jinja", *place]


def _kernels_in_llama_server() -> KernelsStart:
    """Return the variable that loads the plug-in into the installed llama-server."""
    if not PLUGIN_FILE.is_file():
        return KernelsStart(missing=f"{PLUGIN_FILE.name} is missing")
    found = check_build(Path(str(shutil.which("llama-server"))))
    if not found.supported:
        return KernelsStart(missing=found.reason)
    options = ("--no-host",) if found.gpu else ()
    return KernelsStart({found.variable: str(PLUGIN_FILE)}, options)


def _kernels_in_package(package: str) -> KernelsStart:
    """Return the variable that lets our start module of a Python package load the plug-in."""
    return KernelsStart({KERNELS_VARIABLE: "1"}, missing=why_not_in_llama_cpp(package))


def _xllamacpp(file: Path, at: Address) -> list[str]:
    module = "sqft_export.inference.xllamacpp_server"
    return [sys.executable, "-m", module, str(file), at.host, str(at.port), at.model]


def _llama_cpp_python(file: Path, at: Address) -> list[str]:
    place = ["--host", at.host, "--port", str(at.port), "--model_alias", at.model]
    module = "sqft_export.inference.llama_cpp_server"
    return [sys.executable, "-m", module, "--model", str(file), *place]


def _ovms(folder: Path, at: Address) -> list[str]:
    place = ["--rest_bind_address", at.host, "--rest_port", str(at.port), "--model_name", at.model]
    return ["ovms", *place, "--model_path", str(folder), "--task", "text_generation"]


SERVERS: dict[str, tuple[Server, ...]] = {
    "gguf": (
        Server(
            "llama-server",
            _llama_server,
            lambda: shutil.which("llama-server") is not None,
            "a release of llama.cpp (github.com/ggml-org/llama.cpp), or its package in a system's "
            "package manager",
            _kernels_in_llama_server,
        ),
        Server(
            "llama.cpp's server in xllamacpp",
            _xllamacpp,
            lambda: installed("xllamacpp"),
            "pip install xllamacpp",
            lambda: _kernels_in_package("xllamacpp"),
        ),
        Server(
            "llama-cpp-python",
            _llama_cpp_python,
            lambda: installed("llama_cpp.server") and installed("uvicorn"),
            "pip install 'llama-cpp-python[server]', which compiles llama.cpp",
            lambda: _kernels_in_package("llama-cpp-python"),
        ),
    ),
    "openvino": (
        Server(
            "OpenVINO Model Server",
            _ovms,
            lambda: shutil.which("ovms") is not None,
            "a release of github.com/openvinotoolkit/model_server; or its image: docker run "
            "openvino/model_server with the same options",
        ),
    ),
}


def check_port(at: Address) -> None:
    """Check that a server can listen at an address.

    :raises UserError: if another program listens there, or the host is not of this machine.
    """
    try:
        family, *_, place = socket.getaddrinfo(at.host, at.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise UserError(
            f"{at.host}:{at.port}: no server can listen there: {error.strerror}; --port and --host "
            "name another place"
        ) from error


def server_for(deployment: Deployment, at: Address) -> Server:
    """Return the first installed server for a deployment.

    :raises UserError: with the commands and how to install them, if none is.
    """
    kind = kind_of(deployment.path)
    if kind not in SERVED_KINDS:
        reason = NO_SERVER.get(kind, "only deployments are served")
        raise UserError(f"{deployment.path}: {reason}")
    for server in SERVERS[kind]:
        if server.here():
            return server
    raise UserError(_how_to_install(deployment.path, at, kind))


def _how_to_install(folder: Path, at: Address, kind: str) -> str:
    file = folder / "model.gguf" if kind == "gguf" else folder
    lines = [f"{folder}: no server for {kind} is installed. Install one of these and run it:"]
    for server in SERVERS[kind]:
        lines += [f"  {server.install}", f"      {shlex.join(server.command(file, at))}"]
    return "\n".join(lines)


def kernels_of(server: Server, execution: str) -> KernelsStart:
    """Return what starts a server on our kernels; nothing, with a warning, if they can't run."""
    execution = resolve_execution(execution)
    if execution == STOCK:
        return KernelsStart()
    found = server.kernels() if server.kernels else KernelsStart(missing=NO_KERNELS)
    if found.missing:
        _logger.warning("%s: our kernels are not used: %s", server.name, found.missing)
        return KernelsStart()
    return replace(found, variables=found.variables | {"SQFT_FORM": execution})


@contextmanager
def served_path(folder: Path) -> Iterator[Path]:
    """Yield the path that a server loads: the GGUF file, inflated if it is packed, or the folder.

    :raises UserError: if the folder has a form that its server does not load.
    """
    if kind_of(folder) == "gguf":
        with dense_gguf(folder) as file:
            yield file
        return
    form = form_of(folder)
    if form == "specialized":
        raise UserError(
            f"{folder}: runs on the kernels of this package, which OpenVINO Model Server does not "
            "have; serve the deployment's model folder"
        )
    if form == "packed":
        raise UserError(
            f"{folder}: is packed, which OpenVINO Model Server does not load; first: sqft-export "
            f"unpack {shlex.quote(str(folder))} <folder>"
        )
    yield folder
