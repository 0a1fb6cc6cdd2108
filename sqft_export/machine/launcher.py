"""Several processes under a launcher (``torchrun``, ``accelerate launch``).

The launcher's environment variables are read here, and other processes wait here for the first.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sqft_export.errors import UserError

# A launcher sets all of these variables; torch.distributed needs the address.
PROCESS_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
ADDRESS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
PRESENCE_FILE = ".first-process"  # locked while the first process works in a run's folder
POLL_SECONDS = 0.5
START_SECONDS = 300.0  # within which all processes of a launcher start
MAX_ABSENCE_SECONDS = 60.0  # time without a first process after which another gives up


def process_rank() -> int:
    """Return the number of this process under a launcher; process 0 writes the artifacts."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the number of this process among those of the launcher on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def on_one_machine() -> bool:
    """Return whether all processes of the launcher run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", process_count())) == process_count()


def process_count() -> int:
    """Return the number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launcher() -> None:
    """Check that the launcher's variables are complete and consistent.

    Variables left over in a shell would otherwise make a single process wait for others.

    :raises UserError: naming the variables.
    """
    _refuse_first_fsdp()
    found = {name: os.environ[name] for name in PROCESS_VARIABLES if name in os.environ}
    if found == {"LOCAL_RANK": "-1"}:  # an old convention for "no launcher"
        return
    if found and (fault := _launcher_fault(found)):
        shown = ", ".join(f"{name}={value}" for name, value in found.items())
        raise UserError(
            f"{shown}: {fault}. A launcher (torchrun, accelerate launch) sets RANK, WORLD_SIZE, "
            f"LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without one: unset {' '.join(found)}"
        )


def _refuse_first_fsdp() -> None:
    """Refuse the first version of FSDP, which flattens the frozen base with the adapters."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("true", "1"):
        return
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UserError(
            f"FSDP_VERSION: found {version}; allowed is 2, which shards frozen weights and "
            "adapters separately: accelerate launch --use_fsdp --fsdp_version 2"
        )


def _launcher_fault(found: dict[str, str]) -> str | None:
    needed = (*PROCESS_VARIABLES, *ADDRESS_VARIABLES)
    if missing := [name for name in needed if not os.environ.get(name)]:
        return f"set without {', '.join(missing)}"
    if odd := [name for name, value in found.items() if not value.isdecimal()]:
        return f"{', '.join(odd)} is not a number"
    if int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        return "RANK is not below WORLD_SIZE"
    return None


@contextlib.contextmanager
def first_process_presence(root: Path) -> Iterator[None]:
    """Hold a lock that shows other processes that the first one works in a run's folder."""
    with FileLock(root / PRESENCE_FILE):
        yield


def first_process_works(root: Path) -> bool:
    """Return whether the first process works in a run's folder."""
    file = root / PRESENCE_FILE
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=0):
            return False
    except Timeout:
        return True


def wait_for_first(root: Path, done: Callable[[], bool]) -> None:
    """Wait until ``done`` returns True, while the first process works in a run's folder.

    :raises UserError: if no first process works there for ``MAX_ABSENCE_SECONDS``.
    """
    seen = time.monotonic()
    while not done():
        if first_process_works(root):
            seen = time.monotonic()
        elif time.monotonic() - seen > MAX_ABSENCE_SECONDS:
            raise UserError(
                f"RANK={process_rank()}, WORLD_SIZE={process_count()}: this process waits for the "
                f"first one (RANK=0), which does not run in {root}; start all processes with "
                "a launcher, or unset these variables"
            )
        time.sleep(POLL_SECONDS)
