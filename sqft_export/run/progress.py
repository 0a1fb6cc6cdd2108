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

    def __init__(self, terminal: IO[str]):
        self.console = Console(file=terminal)
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

            def advance(note: str = "") -> None:
                running.done, running.note = running.done + 1, note
                self.bars.update(task, advance=1, note=note)

            return advance

        return start

    def say(self, line: str) -> None:
        """Print a line and end the progress lines of the current pass."""
        self.running = None
        self.console.print(line)

    def print_lines(self, ended: threading.Event) -> None:
        """Print a progress line per interval until the run ends; standard output is its log."""
        while not ended.wait(LINE_INTERVAL_SECONDS):
            if self.running is not None:
                line = self.running.line()
                print(line, flush=True)
                if not self.console.is_terminal:
                    self.console.print(line)


@contextlib.contextmanager
def report_progress(terminal: IO[str]) -> Iterator[Reporter]:
    """Yield a reporter that prints to ``terminal``."""
    reporter, ended = Reporter(terminal), threading.Event()
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
