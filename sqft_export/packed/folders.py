"""Pack a deployment folder and unpack it again; the graph is copied, weights come back the same.

A packed folder has ``<weights>.sqft`` in place of ``<weights>``, everything else as it was.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from sqft_export.errors import UserError
from sqft_export.packed.container import PackedFile, Writer, fills_of
from sqft_export.packed.inflate import Memory
from sqft_export.packed.regions import regions_of
from sqft_export.run.artifact import sha256_of
from sqft_export.targets.folder import graph_and_weights

SUFFIX = ".sqft"
PACKED = "packed"  # folder beside a deployment's own, in the artifact of an export


def packed_file(folder: Path) -> Path | None:
    """The packed weight file of a folder, None where it is dense."""
    _, weights = graph_and_weights(folder)
    packed = weights.with_name(weights.name + SUFFIX)
    return packed if packed.is_file() else None


def pack(folder: Path, out: Path, entropy: bool = False) -> dict[str, Any]:
    """Write ``out``, a packed copy of a deployment.

    :param entropy: compress with zstd too; smaller, and slower to load.
    :return: bytes before and after, tensors stored sparse.
    :raises UserError: if the folder is no deployment, is packed already, or ``out`` exists.
    """
    graph, weights = graph_and_weights(folder)
    if not weights.is_file():
        raise UserError(f"{weights}: is missing; a dense deployment is expected")
    partial = _fresh(out)
    for file in folder.rglob("*"):
        if file.is_file() and file != weights:
            place = partial / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    dense = np.memmap(weights, np.uint8, mode="r")
    packed = partial / (weights.name + SUFFIX)
    writer, end = Writer(packed, entropy), 0
    sparse = 0
    for region in regions_of(graph, weights):
        writer.raw(end, dense[end : region.at])
        end = region.at + region.size
        before = len(writer.regions)
        writer.sparse(
            region.name,
            region.at,
            dense[region.at : end],
            region.bits,
            region.elements,
            region.fill,
            fills_of(region.fill, Memory(dense).read),
            region.group,
        )
        sparse += sum(r.kind == "sparse" for r in writer.regions[before:])
    writer.raw(end, dense[end:])
    writer.finish(weights.name, len(dense), sha256_of(weights))
    partial.rename(out)
    size = (out / packed.name).stat().st_size
    return {"dense_bytes": len(dense), "packed_bytes": size, "sparse_tensors": sparse}


def unpack(folder: Path, out: Path) -> dict[str, Any]:
    """Write ``out``, the plain folder that every stock tool loads, byte for byte as it was.

    :raises UserError: if the folder is not packed or is damaged, or ``out`` exists.
    """
    packed = packed_file(folder)
    if packed is None:
        raise UserError(f"{folder}: has no packed weights (*{SUFFIX})")
    with PackedFile(packed) as opened:
        header = opened.header
        if header.file != packed.name.removesuffix(SUFFIX):
            raise UserError(f"{packed}: holds {header.file}; it was renamed or belongs elsewhere")
        partial = _fresh(out)
        shutil.copytree(folder, partial, dirs_exist_ok=True, ignore=lambda *_: {packed.name})
        try:
            opened.inflate_file(partial / header.file)
            if sha256_of(partial / header.file) != header.sha256:
                raise UserError(f"{packed}: what it holds is not the file that was packed")
        except UserError:
            shutil.rmtree(partial)
            raise
    partial.rename(out)
    return {"dense_bytes": header.size, "packed_bytes": packed.stat().st_size}


def _fresh(out: Path) -> Path:
    """An empty folder that becomes ``out`` once it is whole."""
    if out.exists():
        raise UserError(f"{out}: exists already")
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial
