"""Where a run is: a bar on a terminal; once a minute a line in its log, and off a terminal too."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SECONDS = 60.0  # between two lines


class Advance(Protocol):
    def __call__(self, note: str = "") -> None:
        """One more of what a pass counts is done.

        :param note: what else there is to say, such as the loss.
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
    """Tells where a run is; to be used within :func:`reporting`."""

    def __init__(self, terminal: IO[str]):
        self.console = Console(file=terminal)
        columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn())
        said = TextColumn("{task.fields[note]}")
        self.bars = Progress(
            *columns,
            TimeElapsedColumn(),
            said,
            console=self.console,
            disable=not self.console.is_terminal,
            redirect_stdout=False,  # else lines that libraries print break the bars
            redirect_stderr=False,
        )
        self.running: _Pass | None = None

    def start_of(self, name: str) -> Start:
        """``start(total) -> advance`` of one pass."""

        def start(total: int) -> Advance:
            task = self.bars.add_task(name, total=total, note="")
            self.running = running = _Pass(name, total, time.monotonic())

            def advance(note: str = "") -> None:
                running.done, running.note = running.done + 1, note
                self.bars.update(task, advance=1, note=note)

            return advance

        return start

    def say(self, line: str) -> None:
        self.running = None
        self.console.print(line)

    def repeat(self, ended: threading.Event) -> None:
        """A line every so often until a run has ended; standard output is its log."""
        while not ended.wait(SECONDS):
            if self.running is not None:
                line = self.running.line()
                print(line, flush=True)
                if not self.console.is_terminal:
                    self.console.print(line)


@contextlib.contextmanager
def reporting(terminal: IO[str]) -> Iterator[Reporter]:
    reporter, ended = Reporter(terminal), threading.Event()
    lines = threading.Thread(target=reporter.repeat, args=(ended,), daemon=True)
    lines.start()
    try:
        with reporter.bars:
            yield reporter
    finally:
        ended.set()
        lines.join()


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def silent(total: int) -> Advance:
    """Tells nothing."""
    return lambda note="": None
