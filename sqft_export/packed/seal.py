"""Write and check the seal of a deployment, ``provenance.json``.

It lists every other file of the folder with size and SHA-256, and the origin of the model. Its
field ``seal`` is the SHA-256 of all its other fields. In a packed folder it lists the dense weight
file, whose digest is also in the container. A folder without ``provenance.json`` can't be checked.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Required, TypedDict, cast

from sqft_export.artifacts.store import SEAL, files_of, foreign_entries, key_of, sha256_of
from sqft_export.errors import DamagedError, UserError, one_line
from sqft_export.packed.container import PackedFile
from sqft_export.packed.streaming import check_dense_digest
from sqft_export.targets.folder import SUFFIX, check_files, graph_and_weights
from sqft_export.untrusted import MAX_CONFIG_BYTES, fault_of_file, parse_json, read_bounded

PROVENANCE = "provenance.json"
ENTRY_KEYS = ("bytes", "sha256")  # per listed file
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_NAME_CHARACTERS = 1024  # per listed path
REMEDY = f"copy or export it again, or delete {PROVENANCE} to use the folder without a seal"


class ListedFile(TypedDict):
    """A file of a deployment, as its seal lists it."""

    bytes: int
    sha256: str


class Provenance(TypedDict, total=False):
    """The content of ``provenance.json``: the origin of the model, all files, and the seal."""

    made_by: dict[str, str]
    recipe: str
    base: dict[str, str | None]
    data: dict[str, object]
    passes: dict[str, dict[str, object]]
    files: Required[dict[str, ListedFile]]
    seal: str


def write_seal(folder: Path, origin: Mapping[str, object]) -> None:
    """Write ``provenance.json`` with the digests of all files.

    :param origin: the origin of the model: base, data, passes, versions.
    """
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in files_of(folder, PROVENANCE)
    }
    write_provenance(folder, {**origin, "files": files})


def write_provenance(folder: Path, document: Mapping[str, object]) -> None:
    """Write the provenance of a deployment with the seal of its content."""
    (folder / PROVENANCE).write_text(sealed_text(document))


def sealed_text(document: Mapping[str, object]) -> str:
    """Return the text of ``provenance.json`` with the seal of its content."""
    content = {k: v for k, v in document.items() if k != SEAL}
    return json.dumps(content | {SEAL: key_of(content)}, indent=2) + "\n"


def read_seal(folder: Path) -> Provenance | None:
    """Return the provenance of a deployment; None if it has none.

    :raises DamagedError: if the file is invalid, or was changed after sealing.
    """
    file = folder / PROVENANCE
    if not os.path.lexists(file):
        return None
    try:
        document = parse_json(read_bounded(file, MAX_CONFIG_BYTES), PROVENANCE, finite=True)
        if fault := _fault_of_document(document):
            raise UserError(fault)
    except UserError as error:
        raise DamagedError(f"{file}: is damaged: {one_line(error)}; {REMEDY}") from error
    return cast(Provenance, document)


def _fault_of_document(document: object) -> str | None:
    """Describe the first fault of a provenance; None if it is valid."""
    fields = document if isinstance(document, dict) else {}
    files = fields.get("files")
    if not isinstance(files, dict):
        return "files: expected names of files"
    for name, entry in files.items():
        shown = one_line(repr(name), 80)
        if not _is_relative_name(name):
            return f"files: found {shown}; a file of the folder is expected"
        size, digest = (entry.get(k) if isinstance(entry, dict) else None for k in ENTRY_KEYS)
        if type(size) is not int or not isinstance(digest, str) or not SHA256.fullmatch(digest):
            return f"files: {shown}: expected its size and SHA-256"
    sealed = {k: v for k, v in fields.items() if k != SEAL}
    if SEAL in fields and fields[SEAL] != key_of(sealed):
        return "its seal is broken: it was changed after it was written"
    return None


def _is_relative_name(name: str) -> bool:
    """Return whether a listed name is a relative path without ``..``."""
    path = PurePosixPath(name)
    plain = str(path) == name and ".." not in path.parts and "\0" not in name
    return plain and not path.is_absolute() and len(name) <= MAX_NAME_CHARACTERS


def check_seal(folder: Path, whole: bool) -> bool:
    """Compare a deployment with its seal.

    Older versions wrote a provenance without the field ``seal``. Such a folder can be loaded, but a
    complete check fails.

    :param whole: True checks every byte. False checks the sizes of graph and weights, and the
        digest of the graph if it is a separate file.
    :return: whether the deployment has a provenance.
    :raises UserError: if a file is unsafe to open, such as a link out of the folder.
    :raises DamagedError: if a file is missing, added or changed; the message names it.
    """
    document = read_seal(folder)
    if document is not None and whole:
        if SEAL not in document:
            raise DamagedError(
                f"{folder / PROVENANCE}: has no field {SEAL!r}, as in older versions; {REMEDY}"
            )
        if foreign := foreign_entries(folder):
            shown = one_line(", ".join(foreign))
            raise DamagedError(f"{folder}: was added after it was sealed: {shown}")
    check_files(folder)
    if document is not None:
        _check_listed(folder, document, whole)
    return document is not None


def _check_listed(folder: Path, document: Provenance, whole: bool) -> None:
    graph, weights = graph_and_weights(folder)
    packed = weights.with_name(weights.name + SUFFIX)
    listed = dict(document["files"])
    if packed.is_file():
        _check_packed(packed, listed.pop(weights.name, None), whole)
    loaded = [str(file.relative_to(folder)) for file in (graph, weights)]
    names = list(listed) if whole else [name for name in loaded if name in listed]
    for name in names:
        deep = whole or (name == loaded[0] and graph != weights)
        _check_file(folder / name, listed[name], deep)
    if whole:
        there = {str(f.relative_to(folder)) for f in files_of(folder, PROVENANCE)}
        if added := sorted(there - set(listed) - {packed.name}):
            shown = one_line(", ".join(added))
            raise DamagedError(f"{folder}: was added after it was sealed: {shown}")


def _check_file(file: Path, listed: ListedFile, deep: bool) -> None:
    if fault_of_file(file):
        raise DamagedError(f"{one_line(file)}: is missing; {REMEDY}")
    if file.stat().st_size != listed["bytes"] or (deep and sha256_of(file) != listed["sha256"]):
        raise DamagedError(f"{file}: is not the file that was sealed; {REMEDY}")


def _check_packed(packed: Path, listed: ListedFile | None, whole: bool) -> None:
    """Check that a container holds the dense file that the seal lists."""
    with PackedFile(packed) as opened:
        if listed is not None and opened.header.sha256 != listed["sha256"]:
            raise DamagedError(f"{packed}: holds other weights than {PROVENANCE} lists")
        if whole:
            check_dense_digest(opened)


def require_seal(folder: Path) -> Provenance:
    """Return the provenance of a deployment after checking every byte.

    :raises UserError: if it has no provenance.
    :raises DamagedError: if a file is missing, added or changed.
    """
    if not check_seal(folder, whole=True):
        raise UserError(f"{folder}: has no {PROVENANCE}, so it can't be checked")
    document = read_seal(folder)
    assert document is not None
    return document
