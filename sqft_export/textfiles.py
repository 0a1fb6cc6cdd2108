"""Text and JSON from anywhere: what it holds, or one message that names the file."""

from pathlib import Path
from typing import Any

from sqft_export.errors import UserError
from sqft_export.untrusted import MAX_CONFIG_BYTES, parse_json, read_bounded


def decoded(content: bytes, file: Path) -> str:
    """UTF-8, with or without a byte order mark.

    :raises UserError: naming the file and the first byte that is no text.
    """
    return decoded_line(content, file, 0)


def decoded_line(content: bytes, file: Path, start: int) -> str:
    """The same of a part of a file; a byte order mark counts at its start alone.

    :param start: place of the first byte in the file.
    """
    try:
        return content.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"{content[error.start]:#04x}"
        raise UserError(f"{file}: not UTF-8 at byte {start + error.start} ({found})") from error


def read_json(file: Path, limit: int = MAX_CONFIG_BYTES, finite: bool = False) -> dict[str, Any]:
    """The object in a json file.

    :param limit: bytes that are read at most.
    :param finite: refuse NaN and Infinity.
    :raises UserError: naming the file, if it holds none, or a key twice.
    """
    found = parse_json(decoded(read_bounded(file, limit), file), str(file), finite)
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected an object, found {type(found).__name__}")
    return found
