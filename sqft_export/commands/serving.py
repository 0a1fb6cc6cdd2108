"""Servers of deployments: ``serve``, ``model-repository``, and ``llama-plugin`` for llama.cpp."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sqft_export.commands.options import KernelsOption
from sqft_export.commands.web import serve_page
from sqft_export.errors import UserError

if TYPE_CHECKING:
    from sqft_export.inference.locate import Deployment


def serve_command(
    folder: Annotated[
        Path,
        typer.Argument(
            help="run folder, which stands for its best deployment that has a server; or an "
            "OpenVINO or GGUF folder; with --web, a web or ONNX folder",
            metavar="FOLDER",
        ),
    ],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on")] = 8080,
    name: Annotated[
        str | None, typer.Option(help="name of the model for clients; default: name of the run")
    ] = None,
    execution: KernelsOption = None,
    web: Annotated[
        bool, typer.Option("--web", help="show the web page instead; port 0 takes a free one")
    ] = False,
) -> None:
    """Serve a deployment with an OpenAI-compatible interface, on an installed server.

    If none is installed, it prints the command and how to install the server.

    Example: sqft-export serve runs/SmolLM2-135M-Instruct --port 8080
    """
    if web:
        serve_page(folder, host, port)
    else:
        _serve(folder, host, port, name or (folder.resolve().name or "model"), execution)


def _serve(folder: Path, host: str, port: int, name: str, execution: str | None) -> None:
    """Serve a deployment until its server ends."""
    from sqft_export.inference.servers import (
        Address,
        check_port,
        kernels_of,
        served_path,
        server_for,
    )

    found, at = _servable(folder), Address(host, port, name)
    server = server_for(found, at)
    check_port(at)
    ours = kernels_of(server, execution or found.execution)
    with served_path(found.path) as path:
        command = [*server.command(path, at), *ours.options]
        before = "".join(f"{key}={value} " for key, value in ours.variables.items())
        print(f"{found.name}: {found.path}\n{server.name}: {before}", end="", file=sys.stderr)
        _run_server(server.name, command, ours.variables, f"{at.url}, model {at.model}")


def _run_server(name: str, command: list[str], variables: dict[str, str], where: str) -> None:
    """Print the command of a server and run it until it ends.

    :raises UserError: if it fails.
    """
    print(f"{shlex.join(command)}\nserving {where}; Ctrl-C ends", file=sys.stderr, flush=True)
    code = subprocess.run(command, env=os.environ | variables, check=False).returncode
    if code:
        raise UserError(f"{name} ended with exit code {code}; its messages are above")


def model_repository_command(
    folder: Annotated[
        Path,
        typer.Argument(help="run folder, or an OpenVINO deployment", metavar="FOLDER"),
    ],
    repository: Annotated[Path, typer.Argument(help="folder of the repository; may exist")],
    name: Annotated[
        str | None, typer.Option(help="name of the model for clients; default: name of the folder")
    ] = None,
    device: Annotated[
        Literal["CPU", "GPU", "NPU"], typer.Option(help="device that the server runs it on")
    ] = "CPU",
) -> None:
    """Copy a deployment into a model repository of OpenVINO Model Server.

    The repository has a config.json and a folder with a graph.pbtxt per model. Other models of the
    repository stay.

    Example: sqft-export model-repository runs/tiny models
    """
    from sqft_export.inference.locate import deployments_of_run, is_model
    from sqft_export.inference.model_repository import REPOSITORY_CONFIG, add_to_repository
    from sqft_export.machine.host import writing_to
    from sqft_export.targets.folder import kind_of

    path = folder
    if folder.is_dir() and not is_model(folder):
        plain = [one.path for one in deployments_of_run(folder) if one.path.name == "model"]
        found = [path for path in plain if kind_of(path) == "openvino"]
        if not found:
            raise UserError(f"{folder}: has no OpenVINO deployment; add it to export.targets")
        path = found[0]
    with writing_to(repository):
        made = add_to_repository(path, repository, name or folder.resolve().name, device)
    config = shlex.quote(str(repository / REPOSITORY_CONFIG))
    print(f"{made}\novms --rest_port 8000 --config_path {config}")


def _servable(folder: Path) -> "Deployment":
    """Return the deployment to serve: of a run, the best whose format has an installed server."""
    from sqft_export.inference.locate import (
        best_of,
        deployments_of_run,
        find_deployment,
        is_model,
    )
    from sqft_export.inference.servers import SERVED_KINDS, SERVERS
    from sqft_export.targets.folder import kind_of

    if not folder.is_dir() or is_model(folder):
        return find_deployment(folder)
    plain = [one for one in deployments_of_run(folder) if one.path.name == "model"]
    kinds = [kind for kind in SERVED_KINDS if any(server.here() for server in SERVERS[kind])]
    for allowed in (kinds, SERVED_KINDS):
        served = [one for one in plain if kind_of(one.path) in allowed]
        if best := best_of(served):
            return best
    raise UserError(f"{folder}: has no OpenVINO and no GGUF deployment; set export.targets")


def llama_plugin_command(
    check: Annotated[
        Path | None,
        typer.Option(
            help="a program of llama.cpp, such as llama-server, or its libggml.so: print whether "
            "it is supported. The program is started with --version",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Print the environment variable that loads our kernels into an unmodified llama.cpp.

    Write the printed line before the command. It is for builds with separate backends, such as
    llama.cpp's releases. Builds with a linked CPU backend need LD_PRELOAD; --check
    prints the line for your build.

    Example: sqft-export llama-plugin
    """
    from sqft_export.kernels.llama_plugin import check_build, environment_line

    if check is None:
        print(environment_line())
        return
    found = check_build(check)
    if not found.supported:
        raise UserError(f"{check}: our kernels can't be used: {found.reason}")
    print(f"{check}: supported (ggml {found.ggml}, kernels {found.kernels})")
    option = " --no-host" if found.gpu else ""
    if ".so" in check.name:
        print("in Python, before a model is loaded: sqft_export.use_in_llama_cpp()")
    else:
        print(f"{environment_line(found.variable)} {check}{option} -m model.gguf")
    if found.gpu:
        print("this build has a GPU backend: without --no-host, its pinned memory comes first")


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command("serve")(serve_command)
    app.command("llama-plugin")(llama_plugin_command)
    app.command("model-repository")(model_repository_command)
