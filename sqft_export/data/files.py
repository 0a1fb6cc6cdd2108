"""Readers of data files: text, JSON and JSON Lines, with a message for each kind of damage."""

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

Fields = dict[str, Any]  # values of any JSON type; every data set has other fields
# First bytes -> name of common formats that are not text.
BINARY_FORMATS = {b"PAR1": "a parquet file", b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "gzipped"}


class WrittenFloat(float):
    """A float that keeps its text from the file: 1.50 is printed as 1.50."""

    def __new__(cls, text: str) -> "WrittenFloat":
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark.

    :raises UserError: if it is not text; the message names the file and the first invalid byte.
    """
    content = read_bounded(file, MAX_TEXT_BYTES)
    _check_is_text(content, file)
    return decode_text(content, file)


def _check_is_text(content: bytes, file: Path) -> None:
    for magic, name in BINARY_FORMATS.items():
        if content.startswith(magic):
            raise UserError(f"{file}: is {name}; text in UTF-8, .json or .jsonl is allowed")


def read_rows(file: Path) -> list[Fields]:
    """Return the objects of a JSON list or of a JSON Lines file; blank lines are skipped.

    Only a line feed ends a line.

    :raises UserError: if the file has no items, or a line is not a JSON object; the message names
        file and line.
    """
    return [row for _, row in numbered_rows(file)]


def numbered_rows(file: Path) -> list[tuple[int, Fields]]:
    """Return the same with the line number of each object; in a JSON list, its position from 1."""
    found: list[tuple[int, object]]
    if file.suffix == ".json":
        document = parse_json(read_text(file), f"{file}:1", number=WrittenFloat)
        found = list(enumerate(document if isinstance(document, list) else [document], start=1))
    else:
        lines = ((number, line) for number, line in _lines(file) if line.strip())
        found = [
            (number, parse_json(line, f"{file}:{number}", number=WrittenFloat))
            for number, line in lines
        ]
    if not found:
        raise UserError(f"{file}: has no items")
    return [(number, _object_of(row, f"{file}:{number}")) for number, row in found]


def _object_of(row: object, where: str) -> Fields:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {type(row).__name__}")
    return row


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of every line, with one line in memory at a time.

    :raises UserError: if a line is not text or too long; the message names file and line.
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
