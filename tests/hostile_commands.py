"""Run commands on a deployment whose files are exchanged for what is none; JSON lines on stdout.

    python tests/hostile_commands.py <deployment> <empty folder>

It runs as a separate process with limited memory, so that a test can end a hang.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sqft_export import cli

MEMORY = 6 * 2**30  # of addresses; runtimes reserve a third of it
SECONDS = 20  # of one command; then it counts as hanging
HOLE = 48 * 2**30  # bytes of a file that takes no space
COMMANDS = ("inspect", "verify", "pack", "specialize")


def sparse_file(path: Path) -> None:
    with path.open("w") as stream:
        stream.truncate(HOLE)


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path.name),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "hole": sparse_file,
}
# Weights are mapped or hashed by pieces, which takes time by their size.
STREAMED = (".bin", ".data", ".gguf", ".sqft", ".safetensors")


def run_command(command: str, folder: Path, out: Path) -> dict:
    arguments = [command, str(folder), *([str(out)] if command in ("pack", "specialize") else [])]
    said, started = io.StringIO(), time.monotonic()
    sys.argv = ["sqft-export", *arguments]
    signal.alarm(SECONDS)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = cli._run()
    signal.alarm(0)
    seconds = time.monotonic() - started
    return {"code": code, "seconds": seconds, "said": said.getvalue(), "left": out.exists()}


def main(source: Path, scratch: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    names = sorted(f.name for f in source.iterdir() if f.is_file())
    cases = [(name, kind) for name in names for kind in KINDS]
    for name, kind in cases:
        if kind == "hole" and name.endswith(STREAMED):
            continue
        for sealed in (True, False) if kind in ("pipe", "hole") else (False,):
            folder = scratch / "folder"
            shutil.copytree(source, folder)
            (folder / name).unlink()
            KINDS[kind](folder / name)
            if not sealed and name != "provenance.json":
                (folder / "provenance.json").unlink()
            for command in COMMANDS:
                print(json.dumps({"case": [name, kind, sealed, command]}), flush=True)
                print(json.dumps(run_command(command, folder, scratch / "out")), flush=True)
                shutil.rmtree(scratch / "out", ignore_errors=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
