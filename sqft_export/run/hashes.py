"""SHA-256 of files, remembered in the folder of a run while size, mtime and inode stand."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from sqft_export.run.host import write_file

REMEMBERED = "hashes.json"
# A file system stamps changes within one tick of its clock alike; a younger file may still change.
TICK_SECONDS = 0.05


class FileHashes:
    """Hash a file once: its digest is kept by device and inode, with size and mtime.

    Only what saves time relies on it. ``verify`` hashes every file again.

    :param root: folder of a run, in which digests are remembered; it may be missing.
    :param compute: what hashes a file.
    """

    def __init__(self, root: Path, compute: Callable[[Path], str]):
        self.file, self.compute = root / REMEMBERED, compute
        self.known = _read(self.file)
        self.changed = False

    def sha256_of(self, path: Path) -> str:
        found = path.stat()
        age = time.time() - found.st_mtime
        if 0 <= age < TICK_SECONDS:
            time.sleep(TICK_SECONDS - age)
            found = path.stat()
        inode, state = f"{found.st_dev}-{found.st_ino}", [found.st_size, found.st_mtime_ns]
        known = self.known.get(inode)
        if known and known[:2] == state:
            return str(known[2])
        digest = self.compute(path)
        if age >= 0:  # the clock was set back otherwise, and a change may get the same mtime
            self.known[inode] = [*state, digest]
            self.changed = True
        return digest

    def save(self) -> None:
        """Replace the file; without effect where the folder is missing or can't be written, since
        hashing again costs time alone."""
        if not self.changed or not self.file.parent.is_dir():
            return
        with contextlib.suppress(OSError):
            write_file(self.file, json.dumps(self.known))
            self.changed = False


def _read(file: Path) -> dict[str, list[int | str]]:
    """What was remembered; nothing of a file, or an entry, that is damaged."""
    try:
        document = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    entries = document.items() if isinstance(document, dict) else ()
    return {inode: entry for inode, entry in entries if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, list) or [type(part) for part in entry] != [int, int, str]:
        return False
    return len(entry[2]) == 64 and set(entry[2]) <= set("0123456789abcdef")
