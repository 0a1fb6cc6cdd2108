"""Report a run's progress: a bar on a terminal, and one line per minute in the log.

If the output is not a terminal, the lines are printed there too.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_INTERVAL_SECONDS = 60.0


class Advance(Protocol):
    def __call__(self, note: str = "") -> None:
        """Count one finished step of a pass.

        :param note: text to show with it, such as the loss.
        """


Start = Callable[[int], Advance]


def start_at(start: Start, total: int, done: int) -> Advance:
    """Start the progress of a pass of which an interrupted run has finished ``done`` steps."""
    advance = start(total)
    for _ in range(done):
        advance()
    return advance


@dataclass(frozen=True)
class PassProgress:
    """The progress of one pass.

    done, total: finished steps of the pass, and all its steps; equal at its end.
    note: text of the last step, such as the loss; at the end of the pass, its printed line.
    """

    name: str
    done: int
    total: int
    note: str = ""


Listener = Callable[[PassProgress], None]


@dataclass
class _Pass:
    name: str
    total: int
    began: float
    done: int = 0
    note: str = ""

    def line(self) -> str:
        taken = time.monotonic() - self.began
        left = ""
        if self.done:
            left = f", {duration(taken / self.done * (self.total - self.done))} left"
        note = f", {self.note}" if self.note else ""
        return f"{self.name:16} {self.done}/{self.total}{note}, {duration(taken)}{left}"


class Reporter:
    """Show progress bars and print progress lines; use it within :func:`report_progress`."""

    def __init__(
        self, terminal: IO[str], log: IO[str] | None = None, listener: Listener | None = None
    ):
        self.log, self.listener = log, listener
        self.console = Console(file=terminal, quiet=listener is not None)
        columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn())
        note = TextColumn("{task.fields[note]}")
        self.bars = Progress(
            *columns,
            TimeElapsedColumn(),
            note,
            console=self.console,
            disable=not self.console.is_terminal,
            redirect_stdout=False,  # else lines that libraries print break the bars
            redirect_stderr=False,
        )
        self.running: _Pass | None = None

    def start_of(self, name: str) -> Start:
        """Return the function ``start(total) -> advance`` of one pass."""

        def start(total: int) -> Advance:
            task = self.bars.add_task(name, total=total, note="")
            self.running = running = _Pass(name, total, time.monotonic())
            self._notify(name, 0, total, "")

            def advance(note: str = "") -> None:
                running.done, running.note = running.done + 1, note
                self.bars.update(task, advance=1, note=note)
                self._notify(name, running.done, total, note)

            return advance

        return start

    def _notify(self, name: str, done: int, total: int, note: str) -> None:
        if self.listener is not None:
            self.listener(PassProgress(name, done, total, note))

    def say(self, line: str, ended: str = "") -> None:
        """Print a line and end the progress lines of the current pass.

        :param ended: the pass that ended; empty for a warning.
        """
        running, self.running = self.running, None
        total = running.total if running is not None else 1
        self._notify(ended, total, total, line)
        self.console.print(line)

    def print_lines(self, ended: threading.Event) -> None:
        """Print a progress line per interval until the run ends, on the terminal and in the log."""
        while not ended.wait(LINE_INTERVAL_SECONDS):
            if self.running is not None:
                line = self.running.line()
                print(line, file=self.log, flush=True)
                if not self.console.is_terminal:
                    self.console.print(line)


@contextlib.contextmanager
def report_progress(
    terminal: IO[str], log: IO[str] | None = None, listener: Listener | None = None
) -> Iterator[Reporter]:
    """Yield a reporter that prints to ``terminal``, and calls ``listener`` if there is one.

    :param log: receives progress lines too; None: standard output.
    """
    reporter, ended = Reporter(terminal, log, listener), threading.Event()
    lines = threading.Thread(target=reporter.print_lines, args=(ended,), daemon=True)
    lines.start()
    try:
        with reporter.bars:
            yield reporter
    finally:
        ended.set()
        lines.join()


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def silent(total: int) -> Advance:
    """Start a pass without reporting its progress."""
    return lambda note="": None
