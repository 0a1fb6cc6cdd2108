"""Claim an artifact while it is made, so that several workers share a run's folder.

    <stage>-<key>.claim-<number>   JSON: owner; it is renewed while the owner works

Creating a file that must not exist is atomic on every file system, also on those without locks.
``remote.py`` creates objects in the same way. The claim with the highest number counts. A worker
that finds a claim which its owner no longer renews creates the next number; only one worker
succeeds. The former owner finds the higher number before it seals, and uses the new owner's
artifact.

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
from typing import Protocol

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

    @classmethod
    def from_json(cls, text: str | bytes) -> "Owner":
        """Return the owner that a claim names; an unknown one if the text is incomplete."""
        try:
            found = json.loads(text)
            return cls(str(found["machine"]), int(found["process"]))
        except (ValueError, KeyError, TypeError):
            return cls("", 0)

    def to_json(self, renewal: str = "") -> str:
        """Return the content of a claim.

        :param renewal: text that every renewal changes.
        """
        content = {"machine": self.machine, "process": self.process, "renewal": renewal}
        return json.dumps(content)

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


class ClaimRecords(Protocol):
    """The numbered claims of one artifact, in a folder or an object store.

    interval_factor: multiplies the seconds between renewals and between polls.
    """

    @property
    def interval_factor(self) -> float: ...

    def numbers(self) -> list[int]:
        """Return the numbers of all claims, sorted."""

    def create(self, number: int, owner: Owner) -> bool:
        """Create a claim; return False if another worker was faster."""

    def renew(self, number: int) -> None:
        """Change a claim, so that others see that its owner works."""

    def delete(self, number: int) -> None:
        """Delete a claim; it may be missing."""

    def state_of(self, number: int) -> object:
        """Return what changes when a claim is renewed; None if it is missing."""

    def owner_of(self, number: int) -> Owner:
        """Return the owner of a claim; an unknown one if it is missing or incomplete."""


def _last_number(records: ClaimRecords) -> int:
    """Return the number of the claim that counts; 0 without a claim."""
    return max(records.numbers(), default=0)


@dataclass(frozen=True)
class HeldClaim:
    """A claim of this process.

    owner_ended: no process writes into the folder of the claim before it.
    """

    records: ClaimRecords
    number: int
    owner_ended: bool

    def is_lost(self) -> bool:
        """Return whether another worker has taken over."""
        return _last_number(self.records) != self.number

    def release(self) -> None:
        """Delete the claim and those before it, the last one last."""
        for number in self.records.numbers():
            if number <= self.number:
                self.records.delete(number)


@contextlib.contextmanager
def hold_claim(
    records: ClaimRecords, sealed: Callable[[], bool], report_wait: Callable[[str], None]
) -> Iterator[HeldClaim | None]:
    """Wait until this process may make an artifact and yield its claim; None if it is sealed.

    :param sealed: returns whether the artifact is sealed.
    :param report_wait: called once with the owner if another worker has the claim.
    """
    claim = _wait_for_claim(records, sealed, report_wait)
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


def _renew(claim: HeldClaim, stop: threading.Event) -> None:
    while not stop.wait(RENEWAL_SECONDS * claim.records.interval_factor):
        # Taken over and released, or a network that fails: the next renewal may succeed.
        with contextlib.suppress(FileNotFoundError, HostError):
            claim.records.renew(claim.number)


def _wait_for_claim(
    records: ClaimRecords, sealed: Callable[[], bool], report_wait: Callable[[str], None]
) -> HeldClaim | None:
    watched, since, reported = None, time.monotonic(), False
    while not sealed():
        last = _last_number(records)
        state = (last, records.state_of(last)) if last else None
        if state != watched:
            watched, since = state, time.monotonic()
        ended = last > 0 and records.owner_of(last).has_ended()
        expired = last > 0 and time.monotonic() - since > EXPIRY_SECONDS
        if (not last or ended or expired) and _take(records, last + 1):
            return HeldClaim(records, last + 1, not expired)
        if last and not reported:
            report_wait(_owner_text(records.owner_of(last)))
            reported = True
        time.sleep(CLAIM_POLL_SECONDS * records.interval_factor)
    return None


def _take(records: ClaimRecords, number: int) -> bool:
    """Create the claim of this number; return False if another worker was faster."""
    if not records.create(number, Owner.of_this_process()):
        return False
    if _last_number(records) == number:
        return True
    records.delete(number)
    return False


def _owner_text(owner: Owner) -> str:
    return f"process {owner.process} on {owner.machine.partition(' ')[0] or 'another machine'}"


@dataclass(frozen=True)
class ClaimFiles:
    """The claims of an artifact in its folder; the modification time of a claim is renewed.

    path: folder of the artifact once it is sealed.
    """

    path: Path
    interval_factor: float = 1.0

    def numbers(self) -> list[int]:
        files = self.path.parent.glob(f"{self.path.name}.claim-*")
        ends = (file.name.rpartition("-")[2] for file in files)
        return sorted(int(end) for end in ends if end.isdecimal())

    def create(self, number: int, owner: Owner) -> bool:
        """Create the file of a claim.

        :raises HostError: if the folder does not allow it.
        """
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        try:
            descriptor = os.open(self._file(number), flags, 0o666)
        except FileExistsError:
            return False
        except OSError as error:
            raise HostError(
                f"{self.path.parent}: a worker can't claim a pass here: {error.strerror}; several "
                "workers need a folder in which each can create files"
            ) from error
        with os.fdopen(descriptor, "w") as stream:
            stream.write(owner.to_json())
        return True

    def renew(self, number: int) -> None:
        os.utime(self._file(number))

    def delete(self, number: int) -> None:
        self._file(number).unlink(missing_ok=True)

    def state_of(self, number: int) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return self._file(number).stat().st_mtime_ns
        return None

    def owner_of(self, number: int) -> Owner:
        with contextlib.suppress(OSError):
            return Owner.from_json(self._file(number).read_bytes())
        return Owner("", 0)

    def _file(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.claim-{number}")


@dataclass(frozen=True)
class Claim:
    """A claim of this process on an artifact.

    path: folder of the artifact once it is sealed.
    partial: folder that only this claim's owner writes into.
    held: the claim in the run's folder. shared: the claim in the object store, if there is one.
    """

    path: Path
    partial: Path
    held: HeldClaim
    shared: HeldClaim | None = None

    @property
    def number(self) -> int:
        return self.held.number

    def is_lost(self) -> bool:
        """Return whether another worker has taken over."""
        return self.held.is_lost() or (self.shared is not None and self.shared.is_lost())


@contextlib.contextmanager
def claim_artifact(
    path: Path, sealed: Callable[[], bool], report_wait: Callable[[str], None]
) -> Iterator[Claim | None]:
    """Wait until this process may make an artifact and yield its claim; None if it is sealed.

    :param path: folder of the artifact once it is sealed.
    :param sealed: returns whether it is sealed.
    :param report_wait: called once with the owner if another worker has the claim.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold_claim(ClaimFiles(path), sealed, report_wait) as held:
        if held is None:
            yield None
            return
        partial = _partial_of(path, held.number)
        _adopt_files(path, partial, held.owner_ended)
        yield Claim(path, partial, held)


def _adopt_files(path: Path, partial: Path, owner_ended: bool) -> None:
    """Move or copy the unfinished files of the last owner to the folder of the new one.

    :param owner_ended: no process writes them. Otherwise their owner may be suspended: the files
        are copied, so that nobody else writes into the copy.
    """
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
    return _partial_of(path, max(1, _last_number(ClaimFiles(path))))


def _partial_of(path: Path, number: int) -> Path:
    return path.with_suffix(".partial" if number == 1 else f".{number}.partial")


def partial_folders(path: Path) -> list[Path]:
    """Return the folders with unfinished files of an artifact."""
    return [*path.parent.glob(f"{path.name}.partial"), *path.parent.glob(f"{path.name}.*.partial")]
