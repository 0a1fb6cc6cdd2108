"""Open untrusted files and folders: regular files of bounded size, no links out of a folder.

Every file that comes from outside the package is opened here. Pipes and devices are refused before
they are opened, because opening one can block forever. Too large files are refused before they are
read.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

from sqft_export.errors import HostError, UserError, one_line

MAX_CONFIG_BYTES = 2**24  # JSON with settings: configs, provenance, ranks
MAX_JSON_BYTES = 2**28  # JSON with vocabularies, reports or manifests
MAX_IR_BYTES = 2**26  # XML of an OpenVINO graph
MAX_ONNX_BYTES = 2**30  # an ONNX graph with its embedded weights
MAX_TEXT_BYTES = 2**32  # text, or JSON that is not JSON lines
MAX_LINE_BYTES = 2**26  # one line of a JSON lines file
MAX_FOLDER_ENTRIES = 100_000  # files and folders in a model, deployment or artifact
FAULT_OF_TYPE = {
    stat.S_IFDIR: "can't be read: is a folder; a file is expected",
    stat.S_IFIFO: "is no regular file (a pipe)",
    stat.S_IFSOCK: "is no regular file (a socket)",
    stat.S_IFCHR: "is no regular file (a device)",
    stat.S_IFBLK: "is no regular file (a device)",
}
FAULT_OF_ERRNO = {
    errno.ELOOP: "is a circular link",
    errno.ENAMETOOLONG: "has a name that is too long",
}
# Systems differ in these flags: Windows has O_BINARY, the others have O_NONBLOCK and O_CLOEXEC.
OPEN_FLAGS = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
    OPEN_FLAGS |= getattr(os, _name, 0)
SNAPSHOT_NAME = re.compile(r"[0-9a-f]{40}")  # a commit in the hub's cache


def real_path(path: Path) -> Path:
    """Return the absolute path with links resolved; a circular link stays unresolved."""
    return Path(os.path.realpath(path))


def fault_of_file(file: Path) -> str | None:
    """Return why a path can't be read as a file; None for a regular file or a link to one."""
    try:
        mode = file.stat().st_mode
    except ValueError:
        return "has an invalid name"
    except OSError as error:
        if error.errno == errno.ENOENT and file.is_symlink():
            return "is a broken link"
        return FAULT_OF_ERRNO.get(error.errno or 0, f"can't be read: {error.strerror}")
    return (
        None if stat.S_ISREG(mode) else FAULT_OF_TYPE.get(stat.S_IFMT(mode), "is no regular file")
    )


def open_regular(file: Path) -> BufferedReader:
    """Open a regular file for reading bytes, without blocking.

    :raises UserError: if it is not a regular file or can't be read.
    """
    if fault := fault_of_file(file):
        raise UserError(f"{one_line(file)}: {fault}")
    try:
        stream = os.fdopen(os.open(file, OPEN_FLAGS), "rb")
    except OSError as error:
        raise _read_error(file, error) from error
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):  # replaced after the first check
        stream.close()
        raise UserError(f"{one_line(file)}: is no regular file")
    return stream


def _read_error(file: Path, error: OSError) -> UserError:
    denied = error.errno in (errno.EACCES, errno.EPERM)
    kind = HostError if denied else UserError
    return kind(f"{one_line(file)}: can't be read: {error.strerror}")


def read_bounded(file: Path, limit: int) -> bytes:
    """Return the content of a regular file.

    :param limit: largest size in bytes.
    :raises UserError: if it is not a regular file, can't be read or is larger than ``limit``.
    """
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise UserError(f"{one_line(file)}: has {size:,} bytes; at most {limit:,} are read")
        try:
            content = stream.read(size + 1)
        except OSError as error:
            raise _read_error(file, error) from error
    if len(content) > size:
        raise UserError(f"{one_line(file)}: grows while it is read")
    return content


def parse_json(
    text: str | bytes,
    where: str,
    finite: bool = False,
    number: Callable[[str], object] | None = None,
) -> Any:
    """Parse a JSON text.

    :param where: name of the text in messages.
    :param finite: refuse NaN and Infinity, which are not JSON but are often written.
    :param number: converts a number with a fraction or exponent; None converts to float.
    :raises UserError: if it is not JSON, is nested too deeply or repeats a key.
    """
    constant = _refuse_constant if finite else number
    try:
        return json.loads(
            text,
            object_pairs_hook=_refuse_duplicate_keys,
            parse_constant=constant,
            parse_float=number,
        )
    except RecursionError as error:
        raise UserError(f"{where}: is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {one_line(error)}") from error


def _refuse_duplicate_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build an object and refuse repeated keys: JSON readers differ in the value they keep."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {one_line(repr(twice), 80)} appears twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _hub_blobs(folder: Path) -> list[Path]:
    """Return the blobs folder behind a snapshot of the hub's cache; empty for other folders."""
    for place in (folder, *folder.parents):
        repository = place.parent.parent
        in_snapshots = place.parent.name == "snapshots" and SNAPSHOT_NAME.fullmatch(place.name)
        if in_snapshots and repository.name.startswith("models--"):
            return [repository / "blobs"]
    return []


def path_inside(folder: Path, path: Path) -> Path:
    """Return the real path of an entry of a folder.

    Links may point to files in the same folder. Links in a snapshot of the hub's cache
    (``models--*/snapshots/<40 hex digits>``) may also point to the blobs of the same model.

    :raises UserError: if it is a link to any other place.
    """
    home, real = real_path(folder), real_path(path)
    if not any(real.is_relative_to(place) for place in (home, *_hub_blobs(home))):
        raise UserError(
            f"{one_line(path)}: is a link to {one_line(real)}, outside the folder; copy the "
            "file into the folder"
        )
    return real


def entries_of(folder: Path) -> list[Path]:
    """List files, links and empty folders below a folder, sorted; links are not followed.

    :raises UserError: if there are more than ``MAX_FOLDER_ENTRIES``.
    """
    found: list[Path] = []
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        inside = list(os.scandir(place))
        folders = [place / e.name for e in inside if e.is_dir(follow_symlinks=False)]
        found += [place / e.name for e in inside if not e.is_dir(follow_symlinks=False)]
        found += [place] if not inside and place != folder else []
        waiting += folders
        if len(found) + len(waiting) > MAX_FOLDER_ENTRIES:
            raise UserError(f"{folder}: has more than {MAX_FOLDER_ENTRIES:,} entries")
    return sorted(found)


def files_inside(folder: Path) -> list[Path]:
    """List the regular files below a folder, sorted, without empty folders and folder links.

    :raises UserError: naming an entry that links out of the folder or is not a regular file.
    """
    found = []
    for path in entries_of(folder):
        if path_inside(folder, path).is_dir():
            continue
        if fault := fault_of_file(path):
            raise UserError(f"{one_line(path)}: {fault}")
        found.append(path)
    return found
