"""Find the libraries that the package's C sources were compiled to.

Only folders of the package are searched, never a deployment.
"""

from pathlib import Path

LIBRARY_SUFFIXES = (".so", ".pyd", ".dylib")


def built_library(folder: Path, stem: str) -> Path | None:
    """Return the file of a compiled library, or None if it was not built.

    :param stem: start of the file name.
    """
    found = (file for file in sorted(folder.glob(f"{stem}*")) if file.suffix in LIBRARY_SUFFIXES)
    return next(found, None)
