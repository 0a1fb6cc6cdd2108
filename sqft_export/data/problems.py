"""Records of a file of problems, read once per process while the file stays the same.

A run needs them for its checks, calibration, training, model card and certificate.
"""

import functools
import time
from collections.abc import Iterator
from pathlib import Path

from sqft_export.data.datasets import Record
from sqft_export.data.files import numbered_rows
from sqft_export.recipe.schema import Problems
from sqft_export.recipe.templates import fill_template

_MAX_CACHED_BYTES = 2**23  # a larger file is read again each time
_CACHED_FILES = 4
# Two changes within one tick of the file system's clock get the same mtime.
_TICK_SECONDS = 0.05

_FileState = tuple[int, int, int, int]  # device, inode, bytes, nanoseconds of the last change


def problem_records(task: Problems, file: Path) -> Iterator[Record]:
    """Yield every item of a JSON Lines file as a record.

    :raises UserError: naming the line that is no item, or lacks a field of the templates.
    """
    state = _state_of(file)
    if state is None:
        yield from _read_records(task.prompt, task.answer, file)
    else:
        yield from _cached_records(task.prompt, task.answer, file, state)


def _state_of(file: Path) -> _FileState | None:
    """Return what identifies a file's content; None if it is missing, large or just written."""
    try:
        found = file.stat()
    except OSError:
        return None
    if found.st_size > _MAX_CACHED_BYTES or time.time() - found.st_mtime < _TICK_SECONDS:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@functools.lru_cache(_CACHED_FILES)
def _cached_records(prompt: str, answer: str, file: Path, state: _FileState) -> tuple[Record, ...]:
    return tuple(_read_records(prompt, answer, file))


def _read_records(prompt: str, answer: str, file: Path) -> Iterator[Record]:
    for number, item in numbered_rows(file):
        text = fill_template(answer, item, file, number)
        yield Record(fill_template(prompt, item, file, number), text, final=text)
