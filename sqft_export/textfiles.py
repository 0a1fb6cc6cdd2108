"""Text and JSON from anywhere: what it holds, or one message that names the file."""

import json
from pathlib import Path
from typing import Any

from sqft_export.errors import UserError


def decoded(content: bytes, file: Path) -> str:
    """UTF-8, with or without a byte order mark.

    :raises UserError: naming the file and the first byte that is no text.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"{content[error.start]:#04x}"
        raise UserError(f"{file}: not UTF-8 at byte {error.start} ({found})") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a json file.

    :raises UserError: naming the file, if it holds none.
    """
    try:
        found = json.loads(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"{file}: is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected an object, found {type(found).__name__}")
    return found
