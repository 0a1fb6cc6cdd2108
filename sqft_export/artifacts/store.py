"""Artifacts: directories sealed by ``manifest.json`` and found by the hash of their facts.

A stage writes into ``<stage>-<key>.partial``. Sealing lists every file with its SHA-256, writes
the manifest last and renames the directory. An artifact that exists is therefore complete. An
interrupted stage leaves only its ``.partial``, which the next run resumes or starts over. A run's
folder may be the local copy of an object store (``remote.py``): sealed artifacts are uploaded, and
those of other machines are downloaded.
"""

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, cast

from sqft_export.artifacts.claims import (
    Claim,
    ClaimLostError,
    claim_artifact,
    partial_folders,
)
from sqft_export.artifacts.hashes import FileHashes
from sqft_export.artifacts.remote import Remote, url_of
from sqft_export.errors import DamagedError, UserError, one_line
from sqft_export.machine.host import openmp_threads, processor_name
from sqft_export.untrusted import (
    MAX_JSON_BYTES,
    entries_of,
    fault_of_file,
    open_regular,
    parse_json,
    path_inside,
    read_bounded,
)

MANIFEST = "manifest.json"
SEAL = "seal"  # SHA-256 of all other fields of the manifest
RECORDED_PACKAGES = (
    *("torch", "transformers", "peft", "openvino", "onnxruntime", "onnxruntime-genai", "gguf"),
    *("cyllama", "xllamacpp"),
)


class Facts(TypedDict):
    """Everything that the key of an artifact is computed from.

    stage, version: the pass and the version of its code.
    options: path of a recipe field -> its value.
    reads: name of another input -> its digest or value.
    parents: consumed pass -> key of its artifact.
    """

    stage: str
    version: int
    options: Mapping[str, object]
    reads: dict[str, object]
    parents: dict[str, str]


class Environment(TypedDict):
    """Where and when an artifact was made."""

    python: str
    platform: str
    processor: str
    threads: int
    versions: dict[str, str | None]
    time: str


class Manifest(TypedDict):
    """``manifest.json``, without its seal.

    metrics: results of the pass; ``metrics`` has their types.
    seconds: duration of the pass.
    files: path in the artifact -> SHA-256.
    """

    stage: str
    key: str
    facts: Facts
    metrics: Mapping[str, object]
    seconds: float
    environment: Environment
    files: dict[str, str]


@dataclass(frozen=True)
class Artifact:
    """A sealed directory and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def key(self) -> str:
        return self.manifest["key"]

    @property
    def metrics(self) -> Mapping[str, object]:
        return self.manifest["metrics"]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file, 64 hex digits."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def key_of(facts: Mapping[str, object]) -> str:
    """Return the SHA-256 of the facts as canonical JSON, 64 hex digits."""
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def files_of(directory: Path, seal: str = MANIFEST) -> list[Path]:
    """List the regular files below a directory, sorted.

    :param seal: name of the file at the top of the directory that is left out.
    """
    found = entries_of(directory)
    return [p for p in found if p != directory / seal and fault_of_file(p) is None]


def foreign_entries(directory: Path) -> list[str]:
    """List entries that a seal can't list: pipes, devices, empty folders, and links that are
    broken, point to a folder or point out of the directory.

    :return: the name and the fault of each.
    """
    return [
        f"{path.relative_to(directory)} {fault}"
        for path in entries_of(directory)
        if (fault := _fault_inside(directory, path))
    ]


def _fault_inside(directory: Path, path: Path) -> str | None:
    if path.is_dir() and not path.is_symlink():
        return "is an empty folder"
    try:
        path_inside(directory, path)
    except UserError:
        return "is a link out of the folder"
    return fault_of_file(path)


def digest_of(path: Path, hash_file: Callable[[Path], str] = sha256_of) -> str:
    """Return the SHA-256 of a file, or of the names and contents of a directory's files.

    :param hash_file: returns the SHA-256 of one file.
    """
    if path.is_file():
        return hash_file(path)
    names = {str(file.relative_to(path)): hash_file(file) for file in files_of(path)}
    return key_of(names)


def environment() -> Environment:
    """Return versions, host and time. The manifest records them; the key does not contain them.

    Processor and number of threads can change how products are rounded, and so what is trained.
    """
    versions: dict[str, str | None] = {}
    for name in ("sqft-export", *RECORDED_PACKAGES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "threads": openmp_threads(),
        "versions": versions,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


class Store:
    """The artifacts of one recipe: ``<root>/<stage>-<first 16 digits of key>/``.

    :param remote: object store that ``root`` is the local copy of.
    """

    def __init__(self, root: Path, remote: Remote | None = None):
        self.root, self.remote = root, remote
        self.hashes = FileHashes(root, sha256_of)
        if remote:
            remote.pull_records(root)

    def path_of(self, stage: str, key: str) -> Path:
        """Return the directory of an artifact once it is sealed."""
        return self.root / f"{stage}-{key[:16]}"

    def partial_of(self, stage: str, key: str) -> Path:
        """Return the directory that a stage writes into before it is sealed."""
        return self.path_of(stage, key).with_suffix(".partial")

    def find(self, stage: str, key: str) -> Artifact | None:
        """Return the sealed artifact of this key after checking its files; None if it is missing.

        The files of an artifact that is only in the object store are missing until :meth:`fetch`.

        :raises DamagedError: naming the file that is missing, added or changed since it was sealed.
        """
        path = self.path_of(stage, key)
        if (path / MANIFEST).exists():
            return check_artifact(path, key, self.hashes.sha256_of)
        content = self.remote.read(f"{path.name}.json") if self.remote else None
        if self.remote is None or content is None:
            return None
        where = f"{self.remote.url}/{path.name}.json"
        found = Artifact(path, _parse_manifest(content, where, f"delete {where} and run again"))
        if found.key != key:
            raise DamagedError(f"{where} belongs to another key; delete it and run again")
        return found

    def fetch(self, artifact: Artifact) -> Artifact:
        """Return an artifact that :meth:`find` has found, here and in the object store.

        :raises DamagedError: if a file in the object store is not the one that was sealed.
        """
        path, files = artifact.path, artifact.manifest["files"]
        if self.remote is None:
            return artifact
        if (path / MANIFEST).exists():
            with contextlib.suppress(ClaimLostError):
                self._upload(artifact)
                return artifact
            found = self.find(artifact.manifest["stage"], artifact.key)
            return self.fetch(found) if found else artifact
        self.remote.download(path.name, files, path, MANIFEST)
        try:
            check_artifact(path, artifact.key, self.hashes.sha256_of)
        except DamagedError as error:
            shutil.rmtree(path)
            place = f"{self.remote.url}/{path.name}.json"
            raise DamagedError(f"{error}; downloaded from {place}, delete that too") from error
        for unfinished in partial_folders(path):
            shutil.rmtree(unfinished, ignore_errors=True)
        return artifact

    def _upload(self, artifact: Artifact) -> None:
        """Publish a sealed artifact in the object store, if there is one.

        :raises ClaimLostError: if another machine has published it; the local copy is deleted.
        """
        if self.remote is None:
            return
        path, files = artifact.path, artifact.manifest["files"]
        theirs = self.remote.read(f"{path.name}.json")
        if theirs is None and self.remote.upload(path, files, MANIFEST):
            return
        theirs = theirs or self.remote.read(f"{path.name}.json")
        if theirs != (path / MANIFEST).read_bytes():
            shutil.rmtree(path)
            raise ClaimLostError(f"{path}: another machine has published it")

    def share_records(self) -> bool:
        """Publish new records of the run; return whether another machine's have replaced some."""
        return self.remote is not None and self.remote.push_records(self.root)

    @contextlib.contextmanager
    def claim(
        self, stage: str, key: str, report_wait: Callable[[str], None]
    ) -> Iterator[Claim | None]:
        """Wait until this process may make an artifact; yield None if another worker has.

        :param report_wait: called once with the owner if another worker has the claim.
        """
        path = self.path_of(stage, key)
        with claim_artifact(path, (path / MANIFEST).exists, report_wait) as claim:
            if claim is None or self.remote is None:
                yield claim
                return
            with self.remote.claim(path.name, report_wait) as shared:
                if shared is None and (found := self.find(stage, key)):
                    self.fetch(found)
                yield replace(claim, shared=shared) if shared else None

    def open_partial(self, stage: str, key: str, resumes: bool, claim: Claim | None = None) -> Path:
        """Create the directory that a stage writes into.

        :param resumes: keep the files of an interrupted run.
        :param claim: the worker's claim, if several workers share the folder.
        """
        partial = claim.partial if claim else self.partial_of(stage, key)
        if partial.exists() and not resumes:
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        for unsealed in (MANIFEST, MANIFEST + ".new"):
            (partial / unsealed).unlink(missing_ok=True)
        return partial

    def seal(
        self,
        partial: Path,
        stage: str,
        facts: Facts,
        metrics: Mapping[str, object],
        seconds: float,
        claim: Claim | None = None,
        unsealed: str = "",
    ) -> Artifact:
        """Write the manifest and rename the directory, after which the artifact exists.

        :param facts: everything that the key is computed from. metrics: results of the stage.
        :param claim: the worker's claim, if several workers share the folder.
        :param unsealed: folder in it that an interrupted pass resumes from; it is deleted last.
        :raises ClaimLostError: if another worker has taken over the pass.
        """
        key, path = key_of(facts), self.path_of(stage, key_of(facts))
        _remove_empty_folders(partial)
        manifest: Manifest = {
            "stage": stage,
            "key": key,
            "facts": facts,
            "metrics": metrics,
            "seconds": round(seconds, 3),
            "environment": environment(),
            "files": {
                str(f.relative_to(partial)): self.hashes.sha256_of(f)
                for f in files_of(partial)
                if not unsealed or not f.is_relative_to(partial / unsealed)
            },
        }
        _write_manifest(partial, manifest)
        if claim and claim.is_lost():
            raise ClaimLostError(f"{partial}: another worker has taken over this pass")
        _publish(partial, path, unsealed)
        self.hashes.save()
        self._upload(made := Artifact(path, manifest))
        return made


def _write_manifest(partial: Path, manifest: Manifest) -> None:
    temporary = partial / (MANIFEST + ".new")
    with temporary.open("w") as stream:
        json.dump(manifest | {SEAL: key_of(manifest)}, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(partial / MANIFEST)


def _publish(partial: Path, path: Path, unsealed: str) -> None:
    """Give a sealed directory its name, without the folder that a pass resumes from.

    :raises ClaimLostError: if another worker has published it.
    """
    if path.exists() and not (path / MANIFEST).exists():  # not an artifact
        shutil.rmtree(path)
    if unsealed and (partial / unsealed).exists():
        (partial / unsealed).rename(path.with_suffix(".sealed.partial"))
    try:
        partial.rename(path)
    except OSError as error:  # a folder with files is not replaced
        if (path / MANIFEST).exists():
            raise ClaimLostError(f"{path}: another worker has sealed it") from error
        raise
    for unfinished in partial_folders(path):
        shutil.rmtree(unfinished, ignore_errors=True)


def _remove_empty_folders(directory: Path) -> None:
    """Remove empty folders: a seal lists only files, so they would count as added later."""
    for path in entries_of(directory):
        while path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
            path = path.parent


def open_store(root: Path) -> Store:
    """Open the artifacts of a recipe; those of an object store if ``root`` is its local copy."""
    url = url_of(root.parent)
    return Store(root, Remote(f"{url}/{root.name}") if url else None)


# Fields of a manifest and their types.
MANIFEST_FIELDS: dict[str, type | tuple[type, ...]] = {
    "stage": str,
    "key": str,
    "facts": dict,
    "metrics": dict,
    "seconds": (int, float),
    "environment": dict,
    "files": dict,
}


def read_artifact(path: Path) -> Artifact:
    """Read the manifest of an artifact without checking its files.

    :raises DamagedError: if the manifest changed since it was sealed.
    """
    file = path / MANIFEST
    try:
        content = read_bounded(file, MAX_JSON_BYTES)
    except UserError as error:
        raise DamagedError(f"{file} is damaged: {one_line(error)}; {_advice(path)}") from error
    return Artifact(path, _parse_manifest(content, str(file), _advice(path)))


def _parse_manifest(content: bytes, where: str, advice: str) -> Manifest:
    """Return a manifest without its seal.

    :raises DamagedError: if it changed since it was sealed.
    """
    try:
        manifest = parse_json(content, where)
        wrong = [k for k, kind in MANIFEST_FIELDS.items() if not isinstance(manifest[k], kind)]
        sealed = {k: v for k, v in manifest.items() if k != SEAL}
        if wrong or key_of(sealed) != manifest[SEAL]:
            raise ValueError(f"its seal is broken{': ' + ', '.join(wrong) if wrong else ''}")
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{where} is damaged: {one_line(error)}; {advice}") from error
    return cast(Manifest, sealed)


def _advice(path: Path) -> str:
    return f"delete {path} and run again"


def check_artifact(
    path: Path, key: str | None = None, hash_file: Callable[[Path], str] = sha256_of
) -> Artifact:
    """Read a sealed artifact and compare every file with its digest.

    :param key: expected key; None: the key of the artifact's facts.
    :param hash_file: returns the SHA-256 of one file.
    :raises DamagedError: naming the file that is missing, added or changed since it was sealed.
    """
    artifact = read_artifact(path)
    listed = artifact.manifest["files"]
    if artifact.key != (key or key_of(artifact.manifest["facts"])):
        raise DamagedError(f"{path / MANIFEST} belongs to another key; {_advice(path)}")
    found = {str(f.relative_to(path)) for f in files_of(path)}
    if wrong := [*sorted(found ^ set(listed)), *foreign_entries(path)]:
        names = one_line(", ".join(wrong))
        raise DamagedError(f"{path} has missing or added files: {names}; {_advice(path)}")
    for name, digest in listed.items():
        if hash_file(path / name) != digest:
            raise DamagedError(
                f"{path / name} is damaged: its SHA-256 is not {digest}; {_advice(path)}"
            )
    return artifact
