"""A run's folder in an object store, such as ``s3://bucket/runs``; each machine has a local copy.

    <url>/<recipe>/blobs/<SHA-256>              a file of one or more artifacts
    <url>/<recipe>/<stage>-<key>.json           manifest of an artifact, written last
    <url>/<recipe>/<stage>-<key>.claim-<n>      claims, see claims.py
    <url>/<recipe>/records/<name>               small files that all workers share

An object store has no atomic rename. A manifest is therefore created only if it is absent, after
all files that it lists. Files are named by their content, so that the files of two workers that
upload the same artifact are never mixed.
"""

import contextlib
import functools
import hashlib
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqft_export.artifacts.claims import HeldClaim, Owner, hold_claim
from sqft_export.errors import DamagedError, HostError, UserError, one_line
from sqft_export.machine.host import cache_folder, write_file

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

URL_FILE = "url"  # in the local copy of all runs
_BLOBS, _RECORDS, _PROBE = "blobs", "records", ".put-if-absent"
# Choices of the first worker, and measurements that the report reads.
_SHARED_RECORD = re.compile(r"[a-z]+-precision\.json|quality-[\w-]+\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# File systems of fsspec that create an object only if it is absent in one request; others query
# first, so that two workers could both succeed. ``memory`` is for tests.
_PACKAGES = {
    "s3": "pip install 'sqft-export[s3]'",
    "gs": "pip install gcsfs",
    "memory": "pip install fsspec",
}


def runs_folder(runs: str | Path) -> Path:
    """Return the folder of all runs; for a URL, the local copy on this machine.

    :raises UserError: if it is a URL of another kind of store.
    """
    url = str(runs).rstrip("/")
    scheme, found, _ = url.partition("://")
    if not found:
        return Path(runs)
    if scheme not in _PACKAGES:
        raise UserError(
            f"--runs: found {one_line(url)}; allowed are a folder, s3://<bucket>/<folder> and "
            "gs://<bucket>/<folder>; a file system that is mounted is a folder"
        )
    folder = _copies() / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / URL_FILE, url)
    return folder


def url_of(runs: Path) -> str | None:
    """Return the URL that a folder of all runs is the local copy of; None for other folders."""
    if runs.absolute().parent != _copies().absolute():
        return None  # an untrusted folder can't name a URL
    file = runs / URL_FILE
    return file.read_text() if file.is_file() else None


def _copies() -> Path:
    return cache_folder() / "runs"


def _is_taken(error: BaseException) -> bool:
    """Return whether S3 has refused to create an object that exists; s3fs makes it an OSError."""
    response = getattr(error.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code == "PreconditionFailed"


@contextlib.contextmanager
def _reported(url: str) -> Iterator[None]:
    """Turn an error of the object store into one for the user; missing objects stay an error."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, ImportError, UserError):
        raise
    except Exception as error:  # each store has its own
        if _is_taken(error):
            raise FileExistsError(url) from error
        raise HostError(
            f"{url}: {type(error).__name__}: {one_line(error)}; check the address, the "
            "credentials and the network"
        ) from error


@functools.cache
def _file_system(url: str) -> "tuple[AbstractFileSystem, str]":
    """Open the file system of a URL; return it and the URL's path in it.

    :raises UserError: if no installed package reaches it.
    """
    try:
        with _reported(url):
            from fsspec.core import url_to_fs

            return url_to_fs(url)
    except ImportError as error:
        advice = _PACKAGES[url.partition("://")[0]]
        raise UserError(f"--runs: {url}: {one_line(error)}; {advice}") from error


class Remote:
    """The objects of one recipe's runs.

    :param url: of the recipe's folder, such as ``s3://bucket/runs/tiny``.
    :raises UserError: if no installed package reaches the URL, or if the store can't create an
        object only if it is absent.
    """

    def __init__(self, url: str):
        self.url = url
        self._fs, self._root = _file_system(url)
        self._require_put_if_absent()

    def _require_put_if_absent(self) -> None:
        self.create(_PROBE, b"")
        if self.create(_PROBE, b""):
            raise UserError(
                f"--runs: {self.url}: this store replaces an object that must be absent "
                "(If-None-Match: *), so that two workers could mix their results; use a store "
                "that supports it, or a shared folder"
            )

    def path(self, *names: str) -> str:
        """Return the path of an object."""
        return "/".join((self._root, *names))

    def read(self, name: str) -> bytes | None:
        """Return the content of a small object; None if it is missing."""
        with _reported(self.url), contextlib.suppress(FileNotFoundError):
            return self._fs.cat_file(self.path(name))
        return None

    def create(self, name: str, content: bytes) -> bool:
        """Write an object if it is absent; return whether this call has written it."""
        try:
            with _reported(self.url):
                self._fs.pipe_file(self.path(name), content, mode="create")
        except FileExistsError:
            return False
        return True

    def replace(self, name: str, content: bytes) -> None:
        """Write an object."""
        with _reported(self.url):
            self._fs.pipe_file(self.path(name), content)

    def delete(self, name: str) -> None:
        """Delete an object; it may be missing."""
        with _reported(self.url), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self.path(name))

    def names(self, folder: str = "") -> list[str]:
        """Return the names of the objects in a folder; empty if it is missing."""
        place = self.path(folder) if folder else self._root
        with _reported(self.url), contextlib.suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            found = self._fs.ls(place, detail=False)
            return [str(path).rstrip("/").rpartition("/")[2] for path in found]
        return []

    def upload(self, folder: Path, files: Mapping[str, str], manifest: str) -> bool:
        """Upload an artifact; return False if another worker has published it.

        :param folder: of the sealed artifact. files: path in it -> SHA-256.
        :param manifest: name of the file in it that makes the artifact valid.
        """
        known = set(self.names(_BLOBS))
        for name, digest in files.items():
            if digest not in known:  # an object exists only once it is complete
                with _reported(self.url):
                    self._fs.put_file(str(folder / name), self.path(_BLOBS, digest))
        return self.create(f"{folder.name}.json", (folder / manifest).read_bytes())

    def download(self, name: str, files: Mapping[str, str], folder: Path, manifest: str) -> None:
        """Download an artifact into a folder, which it replaces only as a whole.

        :param files: path in the artifact -> SHA-256, as its manifest lists them.
        :raises DamagedError: if the manifest lists a file outside the folder, or a file is missing.
        """
        partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.partial")
        try:
            for file, digest in files.items():
                self._download_file(name, file, digest, partial)
            partial.mkdir(parents=True, exist_ok=True)
            (partial / manifest).write_bytes(self.read(f"{name}.json") or b"")
            with contextlib.suppress(OSError):  # another process of this machine was faster
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _download_file(self, name: str, file: str, digest: str, folder: Path) -> None:
        target, fault = folder / file, f"{self.url}/{name}.json is damaged: {one_line(file)}"
        if not target.resolve().is_relative_to(folder.resolve()) or not _SHA256.fullmatch(digest):
            raise DamagedError(f"{fault} is outside of the artifact or has no SHA-256; delete it")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _reported(self.url):
                self._fs.get_file(self.path(_BLOBS, digest), str(target))
        except FileNotFoundError as error:
            raise DamagedError(
                f"{fault}: blobs/{digest} is missing; delete the .json file and run again"
            ) from error

    @contextlib.contextmanager
    def claim(self, name: str, report_wait: Callable[[str], None]) -> Iterator[HeldClaim | None]:
        """Wait until this process may make an artifact; yield None if it is published."""
        records = ClaimObjects(self, name)
        with hold_claim(records, lambda: self.read(f"{name}.json") is not None, report_wait) as it:
            yield it

    def pull_records(self, root: Path) -> None:
        """Download the shared records that a run's folder lacks."""
        for name in self.names(_RECORDS):
            if _SHARED_RECORD.fullmatch(name) and not (root / name).exists():
                content = self.read(f"{_RECORDS}/{name}")
                if content is not None:
                    root.mkdir(parents=True, exist_ok=True)
                    write_file(root / name, content.decode(errors="replace"), replace=False)

    def push_records(self, root: Path) -> bool:
        """Upload new records; return whether another worker's record has replaced one."""
        known, replaced = set(self.names(_RECORDS)), False
        for file in sorted(root.glob("*.json")):
            if not _SHARED_RECORD.fullmatch(file.name):
                continue
            name, content = f"{_RECORDS}/{file.name}", file.read_bytes()
            if file.name not in known and self.create(name, content):
                continue
            theirs = self.read(name)
            if theirs is not None and theirs != content:
                write_file(file, theirs.decode(errors="replace"))
                replaced = True
        return replaced


@dataclass(frozen=True)
class ClaimObjects:
    """The claims of an artifact in an object store; a renewal writes the claim again.

    name: of the artifact's folder.
    """

    remote: Remote
    name: str
    interval_factor: float = 4.0  # each renewal and each poll is a request

    def numbers(self) -> list[int]:
        start = f"{self.name}.claim-"
        ends = (n.removeprefix(start) for n in self.remote.names() if n.startswith(start))
        return sorted(int(end) for end in ends if end.isdecimal())

    def create(self, number: int, owner: Owner) -> bool:
        return self.remote.create(self._object(number), owner.to_json().encode())

    def renew(self, number: int) -> None:
        content = Owner.of_this_process().to_json(uuid.uuid4().hex)
        self.remote.replace(self._object(number), content.encode())

    def delete(self, number: int) -> None:
        self.remote.delete(self._object(number))

    def state_of(self, number: int) -> bytes | None:
        return self.remote.read(self._object(number))

    def owner_of(self, number: int) -> Owner:
        return Owner.from_json(self.state_of(number) or b"")

    def _object(self, number: int) -> str:
        return f"{self.name}.claim-{number}"
