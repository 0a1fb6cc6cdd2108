"""Libraries that were built of the package's C sources; never any of a deployment's."""

from pathlib import Path

SUFFIXES = (".so", ".pyd", ".dylib")


def built_library(folder: Path, stem: str) -> Path | None:
    """The file of a library, or None where there was no compiler."""
    found = (file for file in sorted(folder.glob(f"{stem}*")) if file.suffix in SUFFIXES)
    return next(found, None)
