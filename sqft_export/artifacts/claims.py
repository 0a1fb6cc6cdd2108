"""Claim an artifact while it is made, so that several workers share a run's folder.

    <stage>-<key>.claim-<number>   JSON: owner; the modification time is renewed while it works

Creating a file that must not exist is atomic on every file system, also on those without locks.
The claim with the highest number counts. A worker that finds a claim which its owner no longer
renews creates the next number; only one worker succeeds. The former owner finds the higher number
before it seals, and uses the new owner's artifact.

Times of different machines are not compared: a worker waits until a claim has not changed for
``EXPIRY_SECONDS`` by its own clock. A claim of a process that has ended on this machine expires at
once.
"""

import contextlib
import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sqft_export.errors import HostError

RENEWAL_SECONDS = 5.0
EXPIRY_SECONDS = 120.0  # clients of network file systems see changes up to a minute late
CLAIM_POLL_SECONDS = 0.5
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PROCESSES = Path("/proc/self/ns/pid")


class ClaimLostError(Exception):
    """Another worker has taken over the claim."""


@dataclass(frozen=True)
class Owner:
    """A process: its machine since the last boot, its process namespace, and its id."""

    machine: str
    process: int

    @classmethod
    def of_this_process(cls) -> "Owner":
        boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
        namespace = str(_PROCESSES.readlink()) if _PROCESSES.exists() else ""
        return cls(" ".join(filter(None, (platform.node(), boot, namespace))), os.getpid())

    def has_ended(self) -> bool:
        """Return whether this process is known to have ended; False if it is on another machine."""
        if self.machine != Owner.of_this_process().machine or os.name != "posix":
            return False  # on Windows, os.kill would end the process
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


@dataclass(frozen=True)
class Claim:
    """A claim of this process on an artifact.

    path: folder of the artifact once it is sealed.
    number: of the claim.
    partial: folder that only this claim's owner writes into.
    """

    path: Path
    number: int
    partial: Path

    def is_lost(self) -> bool:
        """Return whether another worker has taken over."""
        return _last_number(self.path) != self.number

    def release(self) -> None:
        """Delete the claim and those before it, the last one last."""
        for number in _numbers(self.path):
            if number <= self.number:
                _file(self.path, number).unlink(missing_ok=True)


@contextlib.contextmanager
def claim_artifact(
    path: Path, sealed: Callable[[], bool], report_wait: Callable[[str], None]
) -> Iterator[Claim | None]:
    """Wait until this process may make an artifact and yield its claim; None if it is sealed.

    :param path: folder of the artifact once it is sealed.
    :param sealed: returns whether it is sealed.
    :param report_wait: called once with the owner if another worker has the claim.
    """
    claim = _wait_for_claim(path, sealed, report_wait)
    if claim is None:
        yield None
        return
    stop = threading.Event()
    renewal = threading.Thread(target=_renew, args=(claim, stop), daemon=True)
    renewal.start()
    try:
        yield claim
    finally:
        stop.set()
        renewal.join()
        claim.release()


def _renew(claim: Claim, stop: threading.Event) -> None:
    file = _file(claim.path, claim.number)
    while not stop.wait(RENEWAL_SECONDS):
        with contextlib.suppress(FileNotFoundError):  # taken over and released
            os.utime(file)


def _wait_for_claim(
    path: Path, sealed: Callable[[], bool], report_wait: Callable[[str], None]
) -> Claim | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    watched, since, reported = None, time.monotonic(), False
    while not sealed():
        last = _last_number(path)
        state = _state_of(path, last) if last else None
        if state != watched:
            watched, since = state, time.monotonic()
        ended = last > 0 and _owner_of(path, last).has_ended()
        expired = last > 0 and time.monotonic() - since > EXPIRY_SECONDS
        if (not last or ended or expired) and (claim := _create(path, last + 1, not expired)):
            return claim
        if last and not reported:
            report_wait(_owner_text(_owner_of(path, last)))
            reported = True
        time.sleep(CLAIM_POLL_SECONDS)
    return None


def _owner_text(owner: Owner) -> str:
    return f"process {owner.process} on {owner.machine.partition(' ')[0] or 'another machine'}"


def _create(path: Path, number: int, owner_ended: bool) -> Claim | None:
    """Create the claim of this number; None if another worker was faster.

    :param owner_ended: no process writes into the folder of the claim before it. Otherwise its
        owner may be suspended: the files are copied, so that nobody else writes into the copy.
    :raises HostError: if the folder does not allow it.
    """
    owner = Owner.of_this_process()
    content = json.dumps({"machine": owner.machine, "process": owner.process})
    try:
        descriptor = os.open(_file(path, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return None
    except OSError as error:
        raise HostError(
            f"{path.parent}: a worker can't claim a pass here: {error.strerror}; several workers "
            "need a folder in which each can create files"
        ) from error
    with os.fdopen(descriptor, "w") as stream:
        stream.write(content)
    if _last_number(path) != number:
        _file(path, number).unlink(missing_ok=True)
        return None
    partial = _partial_of(path, number)
    _adopt_files(path, partial, owner_ended)
    return Claim(path, number, partial)


def _adopt_files(path: Path, partial: Path, owner_ended: bool) -> None:
    """Move or copy the unfinished files of the last owner to the folder of the new one."""
    found = sorted(partial_folders(path), key=lambda folder: folder.stat().st_mtime)
    if not found or found[-1] == partial:
        return
    if partial.exists():
        shutil.rmtree(partial)
    if owner_ended:
        found[-1].rename(partial)
    else:
        shutil.copytree(found[-1], partial)


def claimed_folder(path: Path) -> Path:
    """Return the folder that the owner of an artifact's claim writes into."""
    return _partial_of(path, max(1, _last_number(path)))


def _partial_of(path: Path, number: int) -> Path:
    return path.with_suffix(".partial" if number == 1 else f".{number}.partial")


def partial_folders(path: Path) -> list[Path]:
    """Return the folders with unfinished files of an artifact."""
    return [*path.parent.glob(f"{path.name}.partial"), *path.parent.glob(f"{path.name}.*.partial")]


def _file(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.claim-{number}")


def _numbers(path: Path) -> list[int]:
    ends = (file.name.rpartition("-")[2] for file in path.parent.glob(f"{path.name}.claim-*"))
    return sorted(int(end) for end in ends if end.isdecimal())


def _last_number(path: Path) -> int:
    """Return the number of the claim that counts; 0 without a claim."""
    return max(_numbers(path), default=0)


def _state_of(path: Path, number: int) -> tuple[int, int] | None:
    """Return what changes when a claim is renewed or taken over."""
    with contextlib.suppress(FileNotFoundError):
        return number, _file(path, number).stat().st_mtime_ns
    return None


def _owner_of(path: Path, number: int) -> Owner:
    """Return the owner of a claim; unknown while it is being written or after it was deleted."""
    try:
        found = json.loads(_file(path, number).read_text())
        return Owner(str(found["machine"]), int(found["process"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Owner("", 0)
