"""Threads of a command that computes."""

import sys
from pathlib import Path


def set_compute_threads(threads: int | None, root: Path | None = None) -> None:
    """Set the number of compute threads; print it on stderr if the machine is busy.

    Call this before torch is imported, because torch reads the number at import.

    :param root: folder of a run that may have been interrupted.
    """
    from sqft_export.machine.launcher import process_count
    from sqft_export.machine.processors import set_threads

    if threads is None and process_count() > 1:  # a launcher assigns the processors
        return
    if message := set_threads(threads, root):
        print(message, file=sys.stderr)
