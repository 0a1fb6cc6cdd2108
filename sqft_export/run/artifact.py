"""Artifacts: a directory sealed by ``manifest.json``, found again by the hash of its facts.

A stage writes into ``<stage>-<key>.partial``. Sealing lists every file with its SHA-256, writes
the manifest last and renames the directory: an artifact that exists is whole. An interrupted
stage leaves only its ``.partial``, which the next run continues from or starts over.
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft_export.errors import DamagedError, UserError, one_line
from sqft_export.run.hashes import FileHashes
from sqft_export.run.host import openmp_threads, processor_name
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
SEAL = "seal"  # SHA-256 of all else in it
RECORDED = (
    *("torch", "transformers", "peft", "openvino", "onnxruntime", "onnxruntime-genai", "gguf"),
    "cyllama",
)


@dataclass(frozen=True)
class Artifact:
    """A sealed directory and what its manifest says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def key(self) -> str:
        return self.manifest["key"]

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest["metrics"]


def sha256_of(path: Path) -> str:
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def key_of(facts: dict[str, Any]) -> str:
    """SHA-256 of the facts as canonical JSON, 64 hex digits."""
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def files_of(directory: Path, seal: str = MANIFEST) -> list[Path]:
    """Regular files below a directory, sorted, without its own ``seal``."""
    found = entries_of(directory)
    return [p for p in found if p != directory / seal and fault_of_file(p) is None]


def foreign_entries(directory: Path) -> list[str]:
    """What no seal lists: links out, pipes, devices, links to nothing or to folders, empty folders.

    :return: the name of each and what is wrong with it.
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
    """SHA-256 of a file, or of the names and contents of a directory's files.

    :param hash_file: SHA-256 of one file.
    """
    if path.is_file():
        return hash_file(path)
    names = {str(file.relative_to(path)): hash_file(file) for file in files_of(path)}
    return key_of(names)


def environment() -> dict[str, Any]:
    """Versions, host and time: recorded in the manifest, no part of the key.

    Processor and threads can change how a product is rounded, and so what is trained.
    """
    versions: dict[str, str | None] = {}
    for name in ("sqft-export", *RECORDED):
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
    """The artifacts of one recipe: ``<root>/<stage>-<first 16 digits of key>/``."""

    def __init__(self, root: Path):
        self.root = root
        self.hashes = FileHashes(root, sha256_of)

    def path_of(self, stage: str, key: str) -> Path:
        return self.root / f"{stage}-{key[:16]}"

    def partial_of(self, stage: str, key: str) -> Path:
        return self.path_of(stage, key).with_suffix(".partial")

    def find(self, stage: str, key: str) -> Artifact | None:
        """The sealed artifact of this key, every file checked; None if there is none.

        :raises DamagedError: naming the file that is missing, added or changed since it was sealed.
        """
        path = self.path_of(stage, key)
        if not (path / MANIFEST).exists():
            return None
        return check_artifact(path, key, self.hashes.sha256_of)

    def open_partial(self, stage: str, key: str, resumes: bool) -> Path:
        """The directory a stage works in; kept from an interrupted run if the stage resumes."""
        partial = self.partial_of(stage, key)
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
        facts: dict[str, Any],
        metrics: dict[str, Any],
        seconds: float,
    ) -> Artifact:
        """Write the manifest and rename the directory; from then on the artifact exists."""
        key = key_of(facts)
        _remove_empty_folders(partial)
        manifest = {
            "stage": stage,
            "key": key,
            "facts": facts,
            "metrics": metrics,
            "seconds": round(seconds, 3),
            "environment": environment(),
            "files": {
                str(f.relative_to(partial)): self.hashes.sha256_of(f) for f in files_of(partial)
            },
        }
        manifest[SEAL] = key_of(manifest)
        temporary = partial / (MANIFEST + ".new")
        with temporary.open("w") as stream:
            json.dump(manifest, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(partial / MANIFEST)
        path = self.path_of(stage, key)
        if path.exists():  # a directory without a manifest: not an artifact
            shutil.rmtree(path)
        partial.rename(path)
        self.hashes.save()
        return Artifact(path, manifest)


def _remove_empty_folders(directory: Path) -> None:
    """A seal lists files, and an empty folder in a sealed artifact counts as added."""
    for path in entries_of(directory):
        while path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
            path = path.parent


# What a manifest holds, and of which type.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "stage": str,
    "key": str,
    "facts": dict,
    "metrics": dict,
    "seconds": (int, float),
    "environment": dict,
    "files": dict,
}


def read_artifact(path: Path) -> Artifact:
    """The manifest alone, its files not checked.

    :raises DamagedError: if it is not as it was sealed.
    """
    file = path / MANIFEST
    try:
        manifest = parse_json(read_bounded(file, MAX_JSON_BYTES), str(file))
        wrong = [k for k, kind in FIELDS.items() if not isinstance(manifest[k], kind)]
        sealed = {k: v for k, v in manifest.items() if k != SEAL}
        if wrong or key_of(sealed) != manifest[SEAL]:
            raise ValueError(f"its seal is broken{': ' + ', '.join(wrong) if wrong else ''}")
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{file} is damaged: {one_line(error)}; {_way_out(path)}") from error
    return Artifact(path, manifest)


def _way_out(path: Path) -> str:
    return f"delete {path} and run again"


def check_artifact(
    path: Path, key: str | None = None, hash_file: Callable[[Path], str] = sha256_of
) -> Artifact:
    """Read a sealed artifact and compare every file with its digest.

    :param key: it must have; None: that of its own facts.
    :param hash_file: SHA-256 of one file.
    :raises DamagedError: naming the file that is missing, added or changed since it was sealed.
    """
    artifact = read_artifact(path)
    listed = artifact.manifest["files"]
    if artifact.key != (key or key_of(artifact.manifest["facts"])):
        raise DamagedError(f"{path / MANIFEST} belongs to another key; {_way_out(path)}")
    found = {str(f.relative_to(path)) for f in files_of(path)}
    if odd := [*sorted(found ^ set(listed)), *foreign_entries(path)]:
        names = one_line(", ".join(odd))
        raise DamagedError(f"{path} has missing or added files: {names}; {_way_out(path)}")
    for name, digest in listed.items():
        if hash_file(path / name) != digest:
            raise DamagedError(
                f"{path / name} is damaged: its SHA-256 is not {digest}; {_way_out(path)}"
            )
    return artifact
