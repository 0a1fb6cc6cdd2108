"""What a deployment is made of, and from what: ``provenance.json``, written last.

It lists every other file with its size and SHA-256; in a packed folder the dense weights' digest is
that of the container. A folder without one is anybody's: nothing is known of it.
"""

import json
from pathlib import Path
from typing import Any

from sqft_export.errors import DamagedError, UserError
from sqft_export.packed.container import PackedFile
from sqft_export.run.artifact import files_of, sha256_of
from sqft_export.targets.folder import SUFFIX, graph_and_weights

PROVENANCE = "provenance.json"


def write_seal(folder: Path, origin: dict[str, Any]) -> None:
    """Seal a deployment.

    :param origin: where it is from: base, data, passes, versions.
    """
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in files_of(folder)
        if file.name != PROVENANCE
    }
    document = json.dumps(origin | {"files": files}, indent=2) + "\n"
    (folder / PROVENANCE).write_text(document)


def read_seal(folder: Path) -> dict[str, Any] | None:
    """The provenance of a deployment; None where it has none.

    :raises DamagedError: if it is none.
    """
    file = folder / PROVENANCE
    if not file.is_file():
        return None
    try:
        document = json.loads(file.read_text())
        for entry in document["files"].values():
            if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                raise ValueError("files: expected sizes and digests")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{file}: is damaged: {error}") from error
    return document


def check_seal(folder: Path, whole: bool) -> bool:
    """Compare a deployment with its seal.

    :param whole: every byte; else the sizes of graph and weights, and the digest of a graph that
        is not the weights too.
    :return: whether there is a seal.
    :raises DamagedError: naming the file that is missing, added or another.
    """
    document = read_seal(folder)
    if document is None:
        return False
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
        there = {str(f.relative_to(folder)) for f in files_of(folder)}
        if added := sorted(there - set(listed) - {PROVENANCE, packed.name}):
            raise DamagedError(f"{folder}: was added after it was sealed: {', '.join(added)}")
    return True


def _check_file(file: Path, listed: dict[str, Any], deep: bool) -> None:
    way_out = f"copy or export it again, or delete {PROVENANCE} to do without a seal"
    if not file.is_file():
        raise DamagedError(f"{file}: is missing; {way_out}")
    if file.stat().st_size != listed["bytes"] or (deep and sha256_of(file) != listed["sha256"]):
        raise DamagedError(f"{file}: is not the file that was sealed; {way_out}")


def _check_packed(packed: Path, listed: dict[str, Any] | None, whole: bool) -> None:
    """The container stands for the dense file that the seal lists."""
    with PackedFile(packed) as opened:
        if listed is not None and opened.header.sha256 != listed["sha256"]:
            raise DamagedError(f"{packed}: holds other weights than {PROVENANCE} lists")
        if whole:
            opened.inflate_checked()


def sealed_or_refused(folder: Path) -> dict[str, Any]:
    """The provenance of a deployment, every byte checked.

    :raises UserError: if it has no seal. :raises DamagedError: if it is not as it was sealed.
    """
    if not check_seal(folder, whole=True):
        raise UserError(f"{folder}: has no {PROVENANCE}, so there is nothing to hold it against")
    document = read_seal(folder)
    assert document is not None
    return document
