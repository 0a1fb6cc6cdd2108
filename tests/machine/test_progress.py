"""The progress lines of a long run without a terminal."""

import io
import time

import pytest

from sqft_export.machine import progress
from sqft_export.machine.progress import duration, report_progress


def lines_of(terminal: io.StringIO, wanted: int) -> list[str]:
    deadline = time.monotonic() + 20
    while len(terminal.getvalue().splitlines()) < wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return terminal.getvalue().splitlines()


def test_off_a_terminal_a_pass_says_where_it_is(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_INTERVAL_SECONDS", 0.05)
    terminal = io.StringIO()
    with report_progress(terminal) as reporter:
        advance = reporter.start_of("adapt")(4)
        advance("loss 1.500, 700 tokens/s")
        first = lines_of(terminal, 1)[0]
        assert first.split()[:2] == ["adapt", "1/4,"]
        assert "loss 1.500, 700 tokens/s" in first and first.endswith("s left")
        reporter.say("adapt            3.0 s")
        said = len(terminal.getvalue().splitlines())
        time.sleep(0.2)
        assert len(terminal.getvalue().splitlines()) == said, "nothing is running"
    assert first in capsys.readouterr().out, "standard output is the log of a run"


def test_a_pass_that_has_done_nothing_yet_foretells_nothing(monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL_SECONDS", 0.05)
    terminal = io.StringIO()
    with report_progress(terminal) as reporter:
        reporter.start_of("verify")(3)
        assert "left" not in lines_of(terminal, 1)[0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(12, "12 s"), (600, "10 min"), (7200, "2.0 h"), (89.6, "90 s")]
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text
