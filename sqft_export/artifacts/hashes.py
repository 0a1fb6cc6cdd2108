"""Cache SHA-256 digests of files while device, inode, size and mtime stay the same."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from sqft_export.machine.host import write_file

HASHES_FILE = "hashes.json"
# Two changes within one tick of the file system's clock get the same mtime. A digest is therefore
# taken only once the file's mtime is older than one tick.
TICK_SECONDS = 0.05


class FileHashes:
    """Hash each file once and cache its digest.

    The cache only saves time. ``verify`` hashes every file again.

    :param root: folder of a run, which holds the cache; it may be missing.
    :param compute: function that hashes a file.
    """

    def __init__(self, root: Path, compute: Callable[[Path], str]):
        self.file, self.compute = root / HASHES_FILE, compute
        self.known = _read(self.file)
        self.changed = False

    def sha256_of(self, path: Path) -> str:
        """Return the SHA-256 of a file, from the cache if the file is unchanged."""
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
        if age >= 0:  # a negative age means the clock was set back: mtimes are not reliable
            self.known[inode] = [*state, digest]
            self.changed = True
        return digest

    def save(self) -> None:
        """Write the cache file.

        A missing or read-only folder is ignored, because hashing again only costs time.
        """
        if not self.changed or not self.file.parent.is_dir():
            return
        with contextlib.suppress(OSError):
            write_file(self.file, json.dumps(self.known))
            self.changed = False


def _read(file: Path) -> dict[str, list[int | str]]:
    """Read the cache file; damaged files and damaged entries are ignored."""
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
