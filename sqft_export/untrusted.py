"""Files and folders from outside: regular files of bounded size, links that stay inside.

Every file that a user or a stranger supplies is opened here. A pipe or device is refused before it
is opened, since opening one can wait for ever, and a file is refused by its size before it is read.
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

MAX_CONFIG_BYTES = 2**24  # JSON of settings: configs, provenance, ranks
MAX_JSON_BYTES = 2**28  # JSON of vocabularies, reports and manifests
MAX_IR_BYTES = 2**26  # XML of an OpenVINO graph
MAX_ONNX_BYTES = 2**30  # an ONNX graph, with the weights that are inside it
MAX_TEXT_BYTES = 2**32  # a text, or JSON that is not one object per line
MAX_LINE_BYTES = 2**26  # one line of JSON lines
MAX_FOLDER_ENTRIES = 100_000  # files and folders below a model, a deployment or an artifact
KINDS = {
    stat.S_IFDIR: "can't be read: is a folder; a file is expected",
    stat.S_IFIFO: "is no regular file (a pipe)",
    stat.S_IFSOCK: "is no regular file (a socket)",
    stat.S_IFCHR: "is no regular file (a device)",
    stat.S_IFBLK: "is no regular file (a device)",
}
UNREADABLE = {
    errno.ELOOP: "is a link that leads in a circle",
    errno.ENAMETOOLONG: "has a name that is too long",
}
SNAPSHOT = re.compile(r"[0-9a-f]{40}")  # a revision in the hub's cache


def real_path(path: Path) -> Path:
    """An absolute path without links; a link that leads in a circle stays as it is."""
    return Path(os.path.realpath(path))


def fault_of_file(file: Path) -> str | None:
    """Why a path can't be read as a file; None where it is a regular file or a link to one."""
    try:
        mode = file.stat().st_mode
    except ValueError:
        return "has a name that no file has"
    except OSError as error:
        if error.errno == errno.ENOENT and file.is_symlink():
            return "is a link to nothing"
        return UNREADABLE.get(error.errno or 0, f"can't be read: {error.strerror}")
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "is no regular file")


def open_regular(file: Path) -> BufferedReader:
    """Open a regular file to be read as bytes; never waits for a writer.

    :raises UserError: if it is none, or can't be read.
    """
    if fault := fault_of_file(file):
        raise UserError(f"{one_line(file)}: {fault}")
    try:
        stream = os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise _unreadable(file, error) from error
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):  # exchanged in between
        stream.close()
        raise UserError(f"{one_line(file)}: is no regular file")
    return stream


def _unreadable(file: Path, error: OSError) -> UserError:
    denied = error.errno in (errno.EACCES, errno.EPERM)
    kind = HostError if denied else UserError
    return kind(f"{one_line(file)}: can't be read: {error.strerror}")


def read_bounded(file: Path, limit: int) -> bytes:
    """The content of a regular file.

    :raises UserError: if it is none, can't be read or has more than ``limit`` bytes.
    """
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise UserError(f"{one_line(file)}: has {size:,} bytes; at most {limit:,} are read")
        try:
            content = stream.read(size + 1)
        except OSError as error:
            raise _unreadable(file, error) from error
    if len(content) > size:
        raise UserError(f"{one_line(file)}: grows while it is read")
    return content


def parse_json(
    text: str | bytes,
    where: str,
    finite: bool = False,
    number: Callable[[str], Any] | None = None,
) -> Any:
    """The value in a JSON text.

    :param where: names the text in messages.
    :param finite: refuse NaN and Infinity too, which are not JSON but commonly written.
    :param number: converts the text of a number with a fraction or exponent; None: to a float.
    :raises UserError: if it is none, is nested too deeply or has a key twice.
    """
    constant = _refuse_constant if finite else number
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=constant, parse_float=number
        )
    except RecursionError as error:
        raise UserError(f"{where}: is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {one_line(error)}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two values they take, so a key may be there once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {one_line(repr(twice), 80)} is there twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _blobs_of(folder: Path) -> list[Path]:
    """Where files of a snapshot of the hub's cache really are; empty for any other folder."""
    for place in (folder, *folder.parents):
        repository = place.parent.parent
        in_snapshots = place.parent.name == "snapshots" and SNAPSHOT.fullmatch(place.name)
        if in_snapshots and repository.name.startswith("models--"):
            return [repository / "blobs"]
    return []


def path_inside(folder: Path, path: Path) -> Path:
    """The real path of an entry of a folder.

    A link is followed inside the folder, and from a snapshot of the hub's cache
    (``models--*/snapshots/<40 hex digits>``) to the blobs of the same model.

    :raises UserError: if it is a link that leads out.
    """
    home, real = real_path(folder), real_path(path)
    if not any(real.is_relative_to(place) for place in (home, *_blobs_of(home))):
        raise UserError(
            f"{one_line(path)}: is a link to {one_line(real)}, outside the folder; put the file "
            "there itself"
        )
    return real


def entries_of(folder: Path) -> list[Path]:
    """All that is below a folder but folders that hold something, sorted; links are not followed.

    :raises UserError: if there is too much.
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
    """Regular files of a folder, sorted; empty folders and links to folders inside are left out.

    :raises UserError: naming an entry that is a link out of the folder, or no regular file.
    """
    found = []
    for path in entries_of(folder):
        if path_inside(folder, path).is_dir():
            continue
        if fault := fault_of_file(path):
            raise UserError(f"{one_line(path)}: {fault}")
        found.append(path)
    return found
