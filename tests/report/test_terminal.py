"""What `run` prints on a terminal fits it, and ends with paths and a command that work."""

import json
import os
import pty
import shlex
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from io import StringIO

import pytest

from conftest import ROOT, SMALL, SQFT
from sqft_export.machine.progress import report_progress


def on_a_terminal(command: list[str], columns: int) -> str:
    """Standard output of a command that sees a terminal of that width."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    process = subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment
    )
    os.close(theirs)
    printed = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            part = b""
        if not part:
            break
        printed += part
    os.close(ours)
    assert process.wait() == 0
    return printed.decode().replace("\r\n", "\n")


@pytest.fixture(scope="module", params=[80, 120])
def printed(request, tiny_run) -> tuple[int, str]:
    runs = tiny_run["report"].path.parent.parent
    command = [SQFT, "run", "recipes/tiny.yaml", *SMALL, "--runs", str(runs)]
    return request.param, on_a_terminal(command, request.param)


def test_the_table_and_the_verdict_fit(printed, tiny_run):
    width, text = printed
    table, verdict, *_ = text.split("\n\n")
    assert max(map(len, (table + "\n" + verdict).splitlines())) <= width
    rows = json.loads((tiny_run["report"].path / "report.json").read_text())["rows"]
    lines = table.splitlines()
    assert len(lines) == (len(rows) + 1) * (2 if width == 80 else 1)
    assert len({len(line) for line in lines}) <= 2, "columns are aligned"
    for unit in ("MB", "ms", "MiB", "tokens/s"):
        assert unit in " ".join(lines[:2]), unit
    assert not any(line.startswith(("{", "|")) for line in text.splitlines())


def test_every_deployment_and_the_report_are_named_by_their_path(printed, tiny_run):
    _, text = printed
    for target, forms in {
        "openvino": ("model", "packed", "sparse"),
        "onnx": ("model", "packed"),
        "gguf": ("model", "packed"),
    }.items():
        for form in forms:
            assert f"{tiny_run[f'export-{target}'].path / form}\n" in text
    assert str(tiny_run["report"].path / "index.html") in text


def test_the_next_command_runs_as_printed(printed):
    _, text = printed
    (line,) = [line for line in text.splitlines() if line.startswith("next: ")]
    program, *words = shlex.split(line.removeprefix("next: "))
    assert program == "sqft-export"
    done = subprocess.run([SQFT, *words], capture_output=True, text=True)
    assert done.returncode == 0 and "loads in" in done.stdout


def test_json_alone_is_printed_on_a_terminal_where_it_is_requested(tiny_run):
    runs = tiny_run["report"].path.parent.parent
    command = [SQFT, "run", "recipes/tiny.yaml", *SMALL, "--runs", str(runs), "--json"]
    document = json.loads(on_a_terminal(command, 80))
    assert document == json.loads((tiny_run["report"].path / "report.json").read_text())


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_what_libraries_print_does_not_reach_the_bars(capsys):
    terminal = Terminal()
    with report_progress(terminal) as reporter:
        advance = reporter.start_of("adapt")(2)
        print("a line of a library")
        print("a warning of a library", file=sys.stderr)
        advance()
    assert "library" not in terminal.getvalue()
    captured = capsys.readouterr()
    assert "a line" in captured.out and "a warning" in captured.err
