"""``web``: write a site that runs a deployment in the browser, or show it locally."""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sqft_export.errors import HostError, UserError

if TYPE_CHECKING:
    from sqft_export.web.site import Site


_Source = Annotated[
    Path,
    typer.Argument(
        help="run folder, which stands for its ONNX deployment; or an ONNX deployment",
        metavar="FOLDER",
    ),
]
_Site = Annotated[
    Path | None,
    typer.Argument(help="new folder for the site; left out: a temporary one, with --serve"),
]
_Title = Annotated[str | None, typer.Option(help="heading of the page; default: name of FOLDER")]
_Prompt = Annotated[
    str | None, typer.Option("--prompt", "-p", help="text in the page's input field")
]
_Bundle = Annotated[
    bool,
    typer.Option(
        "--bundle",
        help="write Transformers.js (28 MB, from the npm registry) into the site; default: the "
        "page loads it from the CDN jsDelivr",
    ),
]
_Serve = Annotated[bool, typer.Option("--serve", help="show the site locally")]
_Port = Annotated[int, typer.Option(min=0, max=65535, help="port; 0: a free one")]


def web_command(
    folder: _Source,
    site: _Site = None,
    title: _Title = None,
    prompt: _Prompt = None,
    bundle: _Bundle = False,
    serve: _Serve = False,
    port: _Port = 8080,
) -> None:
    """Write a static site that answers prompts in the browser, on WebGPU or WebAssembly.

    Any static host serves it. Its folder `model` also loads in your own Transformers.js code.

    Example: sqft-export web runs/tiny site --serve
    """
    from sqft_export.web.site import onnx_deployment, write_site

    if site is None and not serve:
        raise UserError("web: name a folder for the site, or use --serve")
    found = onnx_deployment(folder)
    heading = title or folder.resolve().name
    with tempfile.TemporaryDirectory() as scratch:
        place = site if site is not None else Path(scratch) / "site"
        written = write_site(found, place, heading, bundle, prompt)
        print(_summary(written), file=sys.stderr)
        if serve:
            _serve(written.folder, port)


def _summary(site: "Site") -> str:
    megabytes = site.download_bytes / 1e6
    return f"{site.folder}: model of {megabytes:.1f} MB, from {site.deployment.path}"


def _serve(site: Path, port: int) -> None:
    """Serve a site on the loopback address until Ctrl-C.

    :raises HostError: if the port is in use.
    """
    from sqft_export.web.server import open_server

    try:
        server = open_server(site, "127.0.0.1", port)
    except OSError as error:
        raise HostError(f"--port: {port}: {error.strerror}; name another one") from error
    with server:
        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"serving {address}; Ctrl-C ends", file=sys.stderr, flush=True)
        server.serve_forever()


def register(app: typer.Typer) -> None:
    """Add the command of this module to the command line."""
    app.command("web")(web_command)
