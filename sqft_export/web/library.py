"""Fetch Transformers.js and ONNX Runtime Web from the npm registry, checked by their digests.

A site without them loads the same version from the CDN jsDelivr.
"""

import base64
import hashlib
import io
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from sqft_export.errors import UserError, one_line

REGISTRY = "https://registry.npmjs.org"
TIMEOUT = 60  # seconds without an answer
MAX_PACKAGE_BYTES = 2**28


@dataclass(frozen=True)
class Package:
    """A package of the npm registry.

    integrity: SHA-512 of its archive in base64, as the registry states it.
    files: the files of the archive that a site needs.
    """

    name: str
    version: str
    integrity: str
    files: tuple[str, ...]

    @property
    def url(self) -> str:
        """Return the address of the archive."""
        return f"{REGISTRY}/{self.name}/-/{self.name.split('/')[-1]}-{self.version}.tgz"


LIBRARY_MODULE = "transformers.min.js"
TRANSFORMERS_JS = Package(
    "@huggingface/transformers",
    "4.3.2",
    "V3+dqf3iWlRYJ9I9GreM3zGQd0lAXnnoPeddmkOQYWAEE4l/+Fi6p7tx/qVUJlKQgLXGim2W76rTOzz+eC0i7g==",
    (f"dist/{LIBRARY_MODULE}", "LICENSE"),
)
# The version that TRANSFORMERS_JS depends on; its bundle has all of it but these files.
ONNX_RUNTIME_WEB = Package(
    "onnxruntime-web",
    "1.31.0-dev.20260914-8d85527a0",
    "Iy7rtadoBgxS/LLvDr3QW38DB1PNXRnr0GJMcL0TAt7c9qjgVQl83UlGCVyeAnK2InpmW8Uc3PL8XIuqtDeF6g==",
    (
        "dist/ort-wasm-simd-threaded.asyncify.mjs",
        "dist/ort-wasm-simd-threaded.asyncify.wasm",
    ),
)
CDN_MODULE = (
    f"https://cdn.jsdelivr.net/npm/{TRANSFORMERS_JS.name}@{TRANSFORMERS_JS.version}"
    f"/dist/{LIBRARY_MODULE}"
)


def fetch_library(folder: Path) -> None:
    """Write the files that a site needs to run without a CDN.

    :raises UserError: if the registry can't be reached or an archive is not the expected one.
    """
    for package in (TRANSFORMERS_JS, ONNX_RUNTIME_WEB):
        archive = _checked(package, _download(package))
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            for name in package.files:
                found = files.extractfile(f"package/{name}")
                assert found is not None, name  # the digest fixes the content
                (folder / Path(name).name).write_bytes(found.read())


def _download(package: Package) -> bytes:
    try:
        with urllib.request.urlopen(package.url, timeout=TIMEOUT) as answer:
            return bytes(answer.read(MAX_PACKAGE_BYTES))
    except OSError as error:
        raise UserError(
            f"{package.url}: can't be downloaded ({one_line(str(error))}); without --bundle the "
            "page loads the library from a CDN"
        ) from error


def _checked(package: Package, archive: bytes) -> bytes:
    """Return the archive.

    :raises UserError: if its digest is not the expected one.
    """
    found = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if found != package.integrity:
        raise UserError(
            f"{package.url}: found SHA-512 {found}, expected {package.integrity}; a proxy or the "
            "registry changed the archive"
        )
    return archive
