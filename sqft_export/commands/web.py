"""``web``: write a site that runs a deployment in the browser."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sqft_export.errors import HostError

if TYPE_CHECKING:
    from sqft_export.web.site import Site


_Source = Annotated[
    Path,
    typer.Argument(
        help="run folder, which stands for its web or ONNX deployment; or such a deployment",
        metavar="FOLDER",
    ),
]
_Site = Annotated[Path, typer.Argument(help="new folder for the site")]
_Title = Annotated[
    str | None, typer.Option(help="heading of the page; default: name of the recipe")
]
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


def web_command(
    folder: _Source,
    site: _Site,
    title: _Title = None,
    prompt: _Prompt = None,
    bundle: _Bundle = False,
) -> None:
    """Write a static site that answers prompts in the browser, on WebGPU or WebAssembly.

    Any static host serves it. It also loads in your own Transformers.js code. `serve --web` shows
    it locally.

    Example: sqft-export web runs/tiny site
    """
    from sqft_export.web.site import find_source, write_site

    written = write_site(find_source(folder), site, title, bundle, prompt)
    print(_summary(written), file=sys.stderr)


def _summary(site: "Site") -> str:
    megabytes = site.download_bytes / 1e6
    return f"{site.folder}: model of {megabytes:.1f} MB, from {site.deployment.path}"


def serve_page(folder: Path, host: str, port: int) -> None:
    """Serve the page of a run or deployment until Ctrl-C.

    :raises HostError: if no server can listen there.
    """
    from sqft_export.web.server import open_server
    from sqft_export.web.site import page_folder

    with page_folder(folder) as place:
        try:
            server = open_server(place, host, port)
        except OSError as error:
            raise HostError(
                f"{host}:{port}: no server can listen there: {error.strerror}; --port and --host "
                "name another place"
            ) from error
        with server:
            address = f"http://{host}:{server.server_port}/"
            print(f"serving {address}; Ctrl-C ends", file=sys.stderr, flush=True)
            server.serve_forever()


def register(app: typer.Typer) -> None:
    """Add the command of this module to the command line."""
    app.command("web")(web_command)
