"""Read text and JSON from untrusted files; errors name the file."""

from pathlib import Path
from typing import Any

from sqft_export.errors import UserError
from sqft_export.untrusted import MAX_CONFIG_BYTES, parse_json, read_bounded


def decode_text(content: bytes, file: Path) -> str:
    """Decode UTF-8, with or without a byte order mark.

    :raises UserError: if it is not UTF-8; names the file and the first wrong byte.
    """
    return decode_line(content, file, 0)


def decode_line(content: bytes, file: Path, start: int) -> str:
    """Decode a part of a UTF-8 file; a byte order mark is accepted only at the file's start.

    :param start: offset of the part's first byte in the file.
    :raises UserError: if it is not UTF-8; names the file and the first wrong byte.
    """
    try:
        return content.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"{content[error.start]:#04x}"
        raise UserError(f"{file}: not UTF-8 at byte {start + error.start} ({found})") from error


def read_json(file: Path, limit: int = MAX_CONFIG_BYTES, finite: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file.

    :param limit: largest file size in bytes.
    :param finite: refuse NaN and Infinity.
    :raises UserError: naming the file, if it is larger, not a JSON object, or repeats a key.
    """
    found = parse_json(decode_text(read_bounded(file, limit), file), str(file), finite)
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected an object, found {type(found).__name__}")
    return found
