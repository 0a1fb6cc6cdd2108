"""What a deployment is made of, and from what: ``provenance.json``, written last.

It lists every other file with its size and SHA-256, and has the SHA-256 of all else in it as its
own ``seal``. In a packed folder the dense weights' digest is that of the container. Nothing is
known of a folder without one.
"""

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from sqft_export.errors import DamagedError, UserError, one_line
from sqft_export.packed.container import PackedFile
from sqft_export.packed.streaming import check_whole
from sqft_export.run.artifact import SEAL, files_of, foreign_entries, key_of, sha256_of
from sqft_export.targets.folder import SUFFIX, check_files, graph_and_weights
from sqft_export.untrusted import MAX_CONFIG_BYTES, fault_of_file, parse_json, read_bounded

PROVENANCE = "provenance.json"
ENTRY = ("bytes", "sha256")  # of a listed file
SHA256 = re.compile(r"[0-9a-f]{64}")
LONGEST_NAME = 1024  # characters of a listed path
WAY_OUT = f"copy or export it again, or delete {PROVENANCE} to do without a seal"


def write_seal(folder: Path, origin: dict[str, Any]) -> None:
    """Seal a deployment.

    :param origin: where it is from: base, data, passes, versions.
    """
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in files_of(folder, PROVENANCE)
    }
    write_provenance(folder, origin | {"files": files})


def write_provenance(folder: Path, document: dict[str, Any]) -> None:
    """Write the provenance of a deployment with the seal of its content."""
    document = {k: v for k, v in document.items() if k != SEAL}
    document[SEAL] = key_of(document)
    (folder / PROVENANCE).write_text(json.dumps(document, indent=2) + "\n")


def read_seal(folder: Path) -> dict[str, Any] | None:
    """The provenance of a deployment; None where it has none.

    :raises DamagedError: if it is none, or was changed after it was sealed.
    """
    file = folder / PROVENANCE
    if not os.path.lexists(file):
        return None
    try:
        document = parse_json(read_bounded(file, MAX_CONFIG_BYTES), PROVENANCE, finite=True)
        if fault := _fault_of_document(document):
            raise UserError(fault)
    except UserError as error:
        raise DamagedError(f"{file}: is damaged: {one_line(error)}; {WAY_OUT}") from error
    return document


def _fault_of_document(document: Any) -> str | None:
    files = document.get("files") if isinstance(document, dict) else None
    if not isinstance(files, dict):
        return "files: expected names of files"
    for name, entry in files.items():
        shown = one_line(repr(name), 80)
        if not _is_name_inside(name):
            return f"files: found {shown}; a file of the folder is expected"
        size, digest = (entry.get(k) if isinstance(entry, dict) else None for k in ENTRY)
        if type(size) is not int or not isinstance(digest, str) or not SHA256.fullmatch(digest):
            return f"files: {shown}: expected its size and SHA-256"
    sealed = {k: v for k, v in document.items() if k != SEAL}
    if SEAL in document and document[SEAL] != key_of(sealed):
        return "its seal is broken: it was changed after it was written"
    return None


def _is_name_inside(name: str) -> bool:
    """Whether a listed name is a relative path that does not climb, as :func:`write_seal` lists."""
    path = PurePosixPath(name)
    plain = str(path) == name and ".." not in path.parts and "\0" not in name
    return plain and not path.is_absolute() and len(name) <= LONGEST_NAME


def check_seal(folder: Path, whole: bool) -> bool:
    """Compare a deployment with its seal.

    A provenance that has no seal of its own, as older versions wrote it, is enough to load a
    deployment, and not to say that it is as it was sealed.

    :param whole: every byte; else the sizes of graph and weights, and the digest of a graph that
        is not the weights too.
    :return: whether there is a seal.
    :raises UserError: naming what a runtime can't open safely, such as a link out of the folder.
    :raises DamagedError: naming the file that is missing, added or another.
    """
    document = read_seal(folder)
    if document is not None and whole:
        if SEAL not in document:
            raise DamagedError(f"{folder / PROVENANCE}: has no seal of its own; {WAY_OUT}")
        if strangers := foreign_entries(folder):
            shown = one_line(", ".join(strangers))
            raise DamagedError(f"{folder}: was added after it was sealed: {shown}")
    check_files(folder)
    if document is not None:
        _check_listed(folder, document, whole)
    return document is not None


def _check_listed(folder: Path, document: dict[str, Any], whole: bool) -> None:
    graph, weights = graph_and_weights(folder)
    packed = weights.with_name(weights.name + SUFFIX)
    listed = dict(document["files"])
    if packed.is_file():
        _check_packed(packed, listed.pop(weights.name, None), whole)
    names = list(listed) if whole else [n for n in (graph.name, weights.name) if n in listed]
    for name in names:
        deep = whole or (name == graph.name and graph != weights)
        _check_file(folder / name, listed[name], deep)
    if whole:
        there = {str(f.relative_to(folder)) for f in files_of(folder, PROVENANCE)}
        if added := sorted(there - set(listed) - {packed.name}):
            shown = one_line(", ".join(added))
            raise DamagedError(f"{folder}: was added after it was sealed: {shown}")


def _check_file(file: Path, listed: dict[str, Any], deep: bool) -> None:
    if fault_of_file(file):
        raise DamagedError(f"{one_line(file)}: is missing; {WAY_OUT}")
    if file.stat().st_size != listed["bytes"] or (deep and sha256_of(file) != listed["sha256"]):
        raise DamagedError(f"{file}: is not the file that was sealed; {WAY_OUT}")


def _check_packed(packed: Path, listed: dict[str, Any] | None, whole: bool) -> None:
    """The container stands for the dense file that the seal lists."""
    with PackedFile(packed) as opened:
        if listed is not None and opened.header.sha256 != listed["sha256"]:
            raise DamagedError(f"{packed}: holds other weights than {PROVENANCE} lists")
        if whole:
            check_whole(opened)


def sealed_or_refused(folder: Path) -> dict[str, Any]:
    """The provenance of a deployment, every byte checked.

    :raises UserError: if it has no seal. :raises DamagedError: if it is not as it was sealed.
    """
    if not check_seal(folder, whole=True):
        raise UserError(f"{folder}: has no {PROVENANCE}, so there is nothing to hold it against")
    document = read_seal(folder)
    assert document is not None
    return document
