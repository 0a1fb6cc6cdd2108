"""Run a command in a child process, so that a driver that ends it leaves one message.

llama.cpp's GPU backends end their process if the device is lost or its memory is exhausted: ggml
aborts, or the driver's C++ exception meets functions of C. No Python code can catch that.
"""

import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sqft_export.errors import HostError
from sqft_export.machine.host import die_with_parent

DEVICES = ("vulkan", "cuda")  # of llama.cpp
_MESSAGES_FILE = "SQFT_EXPORT_NATIVE_MESSAGES"  # set for the child process
_PARENT = "SQFT_EXPORT_SUPERVISOR"
_MAX_MESSAGE_BYTES = 2**16


def needs_supervision(arguments: Sequence[str]) -> bool:
    """Return whether a command line requests a device whose driver may end the process.

    >>> needs_supervision(["chat", "model", "--device", "vulkan"])
    True
    """
    if _MESSAGES_FILE in os.environ:
        return False
    pairs = itertools.pairwise(arguments)
    values = [value for name, value in pairs if name == "--device"]
    values += [one.partition("=")[2] for one in arguments if one.startswith("--device=")]
    return any(value in DEVICES for value in values)


def supervise(arguments: Sequence[str]) -> int:
    """Run a command line in a child process and return its exit code.

    Messages of native libraries go to a file. If a library ends the child, the last one is printed.
    """
    with tempfile.TemporaryDirectory(prefix="sqft-") as scratch:
        messages = Path(scratch) / "messages"
        messages.touch()
        variables = {_MESSAGES_FILE: str(messages), _PARENT: str(os.getpid())}
        variables["GGML_NO_BACKTRACE"] = "1"  # else ggml starts a debugger, which prints pages
        # -P: do not import from the current folder, which may be untrusted.
        command = [sys.executable, "-P", "-m", "sqft_export.cli", *arguments]
        child = subprocess.Popen(command, env=os.environ | variables)
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the child too
        code = child.wait()
        if code >= 0:
            return code
        text = messages.read_bytes()[-_MAX_MESSAGE_BYTES:].decode(errors="replace")
    print(f"error: {_fault(-code, text)}", file=sys.stderr)
    return HostError.code


def _fault(number: int, messages: str) -> HostError:
    """Return the error of a child that a native library ended."""
    from sqft_export.targets.faults import RUN_AGAIN, device_fault, ended_by_signal

    reason = ended_by_signal(number, messages)
    found = device_fault("the device", RuntimeError(reason))
    return found or HostError(f"the command was {reason}; {RUN_AGAIN}, or use --device cpu")


def redirect_native_messages() -> None:
    """In a supervised child: write messages of native libraries to the supervisor's file.

    Python's own messages still reach the terminal.
    """
    file, parent = (os.environ.pop(name, None) for name in (_MESSAGES_FILE, _PARENT))
    if file is None or parent is None:
        return
    sys.argv[0] = "sqft-export"  # else usage messages name the module
    die_with_parent(int(parent))
    terminal = os.dup(2)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stderr = os.fdopen(terminal, "w", buffering=1, errors="backslashreplace")
