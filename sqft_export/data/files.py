"""Data files as people have them: text and JSON lines, or one message that says what is wrong."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqft_export.errors import UserError
from sqft_export.textfiles import decode_line, decode_text
from sqft_export.untrusted import (
    MAX_LINE_BYTES,
    MAX_TEXT_BYTES,
    open_regular,
    parse_json,
    read_bounded,
)

Fields = dict[str, Any]
# First bytes of what is no text, and what it is called.
BINARY = {b"PAR1": "a parquet file", b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "gzipped"}


class WrittenFloat(float):
    """A number with a fraction or exponent whose text is the one in the file: 1.50 stays 1.50."""

    def __new__(cls, text: str) -> "WrittenFloat":
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text


def read_text(file: Path) -> str:
    """UTF-8, with or without a byte order mark.

    :raises UserError: naming the file and the first byte that is no text.
    """
    content = read_bounded(file, MAX_TEXT_BYTES)
    _check_is_text(content, file)
    return decode_text(content, file)


def _check_is_text(content: bytes, file: Path) -> None:
    for magic, name in BINARY.items():
        if content.startswith(magic):
            raise UserError(f"{file}: is {name}; text in UTF-8, .json or .jsonl is read")


def read_rows(file: Path) -> list[Fields]:
    """Objects of a json list or of jsonl, whose lines end with a line feed; blank ones count for
    nothing.

    :raises UserError: naming the file, and the line, that is not JSON or has no objects.
    """
    return [row for _, row in numbered_rows(file)]


def numbered_rows(file: Path) -> list[tuple[int, Fields]]:
    """The same with the line of each, in a list its place."""
    found: list[tuple[int, Any]]
    if file.suffix == ".json":
        document = parse_json(read_text(file), f"{file}:1", number=WrittenFloat)
        found = list(enumerate(document if isinstance(document, list) else [document], start=1))
    else:
        lines = ((number, line) for number, line in _lines(file) if line.strip())
        found = [
            (number, parse_json(line, f"{file}:{number}", number=WrittenFloat))
            for number, line in lines
        ]
    for number, row in found:
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number}: expected an object, found {type(row).__name__}")
    if not found:
        raise UserError(f"{file}: has no items")
    return found


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line, one in memory at a time.

    :raises UserError: naming the file and the line that is no text or too long.
    """
    with open_regular(file) as stream:
        start = 0
        for number in itertools.count(1):
            content = stream.readline(MAX_LINE_BYTES + 1)
            if not content:
                return
            if number == 1:
                _check_is_text(content, file)
            if len(content) > MAX_LINE_BYTES:
                raise UserError(f"{file}:{number}: has more than {MAX_LINE_BYTES:,} bytes")
            yield number, decode_line(content, file, start)
            start += len(content)
