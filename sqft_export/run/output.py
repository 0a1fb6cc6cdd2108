"""Where a run writes its messages: the user's terminal, and the log in the run's folder.

Libraries print many lines during a run, which go to the log. The command line redirects the file
descriptors 1 and 2, also for native libraries. In a Python program or a notebook, descriptors
belong to the caller: only ``sys.stdout`` and ``sys.stderr`` are replaced until the run ends.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sqft_export.errors import UserError
from sqft_export.machine.progress import Listener, PassProgress
from sqft_export.untrusted import fault_of_file


@dataclass(frozen=True)
class Output:
    """Streams for the user and for the log.

    streams: the caller's ``sys.stdout`` and ``sys.stderr``.
    """

    terminal: IO[str]
    log: IO[str]
    streams: tuple[Any, Any]

    def for_caller(self, listener: Listener | None) -> Listener | None:
        """Return a listener that runs with the caller's ``sys.stdout`` and ``sys.stderr``."""
        if listener is None:
            return None
        stdout, stderr = self.streams

        def call(progress: PassProgress) -> None:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                listener(progress)

        return call


def open_run_file(file: Path) -> IO[str]:
    """Open a file of the run for appending; links are not followed.

    :raises UserError: if the path is a link or not a regular file.
    """
    if file.is_symlink():
        raise UserError(f"{file}: is a link; the run writes a file there")
    if os.path.lexists(file) and (fault := fault_of_file(file)):
        raise UserError(f"{file}: {fault}")
    return file.open("a")


@contextlib.contextmanager
def open_output(log: Path, redirect: bool) -> Iterator[Output]:
    """Open the log of a run.

    :param redirect: redirect the file descriptors; else only Python's streams.
    """
    streams = sys.stdout, sys.stderr
    with open_run_file(log) as file:
        if redirect:
            with _redirect_descriptors(file) as terminal:
                yield Output(terminal, sys.stdout, streams)
            return
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield Output(streams[1], file, streams)


@contextlib.contextmanager
def _redirect_descriptors(file: IO[str]) -> Iterator[IO[str]]:
    """Redirect the descriptors 1 and 2 to a file; yield the real stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with os.fdopen(os.dup(2), "w") as terminal:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, original in zip((1, 2), saved, strict=True):
                os.dup2(original, target)
                os.close(original)
