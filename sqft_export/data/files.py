"""Data files as people have them: text and JSON lines, or one message that says what is wrong."""

import json
from pathlib import Path
from typing import Any

from sqft_export.errors import UserError
from sqft_export.textfiles import decoded

Fields = dict[str, Any]
# First bytes of what is no text, and what it is called.
BINARY = {b"PAR1": "a parquet file", b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "gzipped"}


def read_text(file: Path) -> str:
    """UTF-8, with or without a byte order mark.

    :raises UserError: naming the file and the first byte that is no text.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}") from error
    for magic, name in BINARY.items():
        if content.startswith(magic):
            raise UserError(f"{file}: is {name}; text in UTF-8, .json or .jsonl is read")
    return decoded(content, file)


def read_rows(file: Path) -> list[Fields]:
    """Objects of a json list or of jsonl, whose lines end with a line feed; blank ones count for
    nothing.

    :raises UserError: naming the file, and the line, that is not JSON or has no objects.
    """
    return [row for _, row in numbered_rows(file)]


def numbered_rows(file: Path) -> list[tuple[int, Fields]]:
    """The same with the line of each, in a list its place."""
    text = read_text(file)
    found: list[tuple[int, Any]]
    if file.suffix == ".json":
        document = _parse(text, file, 1)
        found = list(enumerate(document if isinstance(document, list) else [document], start=1))
    else:
        lines = enumerate(text.split("\n"), start=1)
        found = [(number, _parse(line, file, number)) for number, line in lines if line.strip()]
    for number, row in found:
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number}: expected an object, found {type(row).__name__}")
    if not found:
        raise UserError(f"{file}: has no items")
    return found


def _parse(text: str, file: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UserError(f"{file}:{number}: is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{file}:{number}: not JSON: {error}") from error
