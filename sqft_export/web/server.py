"""Serve a site locally. Threads of WebAssembly need two headers that static hosts set too."""

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# A page is isolated by them, and only then has shared memory for threads:
# https://developer.mozilla.org/en-US/docs/Web/API/Window/crossOriginIsolated
ISOLATION_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "credentialless",
}


class _IsolatedHandler(SimpleHTTPRequestHandler):
    """Serves files with the headers above, and logs nothing."""

    def end_headers(self) -> None:
        for name, value in ISOLATION_HEADERS.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        return


def open_server(site: Path, host: str, port: int) -> ThreadingHTTPServer:
    """Return a server of a site's folder; port 0 takes a free one.

    :raises OSError: if the port is in use.
    """
    return ThreadingHTTPServer((host, port), partial(_IsolatedHandler, directory=str(site)))
