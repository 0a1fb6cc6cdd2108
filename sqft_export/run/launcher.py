"""Several processes: what a launcher (``torchrun``, ``accelerate launch``) tells each of them, and
how the others wait for the first."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sqft_export.errors import UserError

# A launcher sets all of these; torch.distributed needs the address.
OF_PROCESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
OF_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
PRESENCE = ".first-process"  # locked while the first process works in a run's folder
POLL_SECONDS = 0.5
ABSENT_SECONDS = 60.0  # without a first process, after which another gives up


def process_rank() -> int:
    """Number of this process under a launcher; 0 writes."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launcher() -> None:
    """Refuse variables that no launcher has set together, such as those left over in a shell.

    :raises UserError: naming them.
    """
    found = {name: os.environ[name] for name in OF_PROCESS if name in os.environ}
    if found == {"LOCAL_RANK": "-1"}:  # an old way to say that there is no launcher
        return
    if found and (fault := _launcher_fault(found)):
        shown = ", ".join(f"{name}={value}" for name, value in found.items())
        raise UserError(
            f"{shown}: {fault}. A launcher (torchrun, accelerate launch) sets RANK in WORLD_SIZE, "
            f"LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without one: unset {' '.join(found)}"
        )


def _launcher_fault(found: dict[str, str]) -> str | None:
    needed = (*OF_PROCESS, *OF_ADDRESS)
    if missing := [name for name in needed if not os.environ.get(name)]:
        return f"set without {', '.join(missing)}"
    if odd := [name for name, value in found.items() if not value.isdecimal()]:
        return f"{', '.join(odd)} is no number"
    if int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        return "RANK is outside WORLD_SIZE"
    return None


@contextlib.contextmanager
def first_process_presence(root: Path) -> Iterator[None]:
    """Show the other processes of a launcher that the first one works in a run's folder."""
    with (root / PRESENCE).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def first_process_works(root: Path) -> bool:
    file = root / PRESENCE
    if not file.exists():
        return False
    with file.open() as held:
        try:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def wait_for_first(root: Path, done: Callable[[], bool]) -> None:
    """Wait for what the first process does in a run's folder.

    :raises UserError: if no first process works there for ``ABSENT_SECONDS``.
    """
    seen = time.monotonic()
    while not done():
        if first_process_works(root):
            seen = time.monotonic()
        elif time.monotonic() - seen > ABSENT_SECONDS:
            raise UserError(
                f"RANK={process_rank()}, WORLD_SIZE={process_count()}: this process waits for the "
                f"first one (RANK=0), which does not work in {root}; start all of them by a "
                "launcher, or unset these variables"
            )
        time.sleep(POLL_SECONDS)
