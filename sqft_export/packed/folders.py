"""Pack a deployment folder and unpack it again; the graph is copied, weights come back the same.

A packed folder has ``<weights>.sqft`` in place of ``<weights>``, and in its model card the code for
a packed folder; everything else is as it was.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sqft_export.errors import DamagedError, UserError
from sqft_export.packed.container import PackedFile, Writer, fills_of
from sqft_export.packed.inflate import Memory
from sqft_export.packed.regions import StoredBlocks, regions_of
from sqft_export.packed.usage import rewrite_card
from sqft_export.run.artifact import sha256_of
from sqft_export.run.host import require_space
from sqft_export.targets.folder import SUFFIX, check_files, graph_and_weights
from sqft_export.untrusted import fault_of_file, files_inside, real_path

# Folders beside a deployment's own, in the artifact of an export.
PACKED = "packed"
SPARSE = "sparse"


def packed_file(folder: Path) -> Path | None:
    """The packed weight file of a folder, None where it is dense."""
    _, weights = graph_and_weights(folder)
    packed = weights.with_name(weights.name + SUFFIX)
    return packed if packed.is_file() else None


def map_weights(file: Path) -> np.ndarray:
    """uint8 of a weight file, mapped.

    :raises UserError: if it is missing, empty or no regular file.
    """
    if fault := fault_of_file(file):
        raise UserError(f"{file}: {fault if os.path.lexists(file) else 'is missing'}")
    if not file.stat().st_size:
        raise UserError(f"{file}: is empty")
    return np.memmap(file, np.uint8, mode="r")


def dense_size(folder: Path) -> int:
    """Bytes of the dense weight file of a deployment, whether it is there or packed.

    :raises UserError: if neither is.
    """
    if packed := packed_file(folder):
        with PackedFile(packed) as opened:
            return opened.header.size
    return len(map_weights(graph_and_weights(folder)[1]))


def pack(folder: Path, out: Path, entropy: bool = False) -> dict[str, Any]:
    """Write ``out``, a packed copy of a deployment.

    :param entropy: compress with zstd too; smaller, and slower to load.
    :return: bytes before and after, tensors stored sparse.
    :raises UserError: if the folder is no deployment, is packed already or holds what is no file of
        it, if ``out`` exists or lies within, or if nothing would be saved.
    """
    graph, weights = graph_and_weights(folder)
    if not os.path.lexists(weights):
        raise UserError(f"{weights}: is missing; a dense deployment is expected")
    check_files(folder)
    with copy_of(folder, out, [weights]) as partial:
        sizes = _pack_weights(graph, weights, partial / (weights.name + SUFFIX), entropy)
        if sizes["packed_bytes"] >= sizes["dense_bytes"]:
            raise NothingSaved(
                f"{weights}: has {sizes['dense_bytes']:,} bytes, packed it would have "
                f"{sizes['packed_bytes']:,}; it stays as it is"
            )
        rewrite_card(partial)
    return sizes


class NothingSaved(UserError):
    """A packed copy would not be smaller."""


def _pack_weights(graph: Path, weights: Path, packed: Path, entropy: bool) -> dict[str, Any]:
    dense, found = map_weights(weights), regions_of(graph, weights)
    writer, end = Writer(packed, entropy), 0
    for region in found:
        writer.raw(end, dense[end : region.at])
        end = region.at + region.size
        if isinstance(region, StoredBlocks):
            data = dense[region.at : end]
            writer.blocks(region.name, region.at, data, region.bits, region.floats, region.row)
            continue
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
    writer.raw(end, dense[end:])
    header = writer.finish(weights.name, len(dense), sha256_of(weights))
    PackedFile(packed).close()  # refuses what could not be unpacked again
    return {
        "dense_bytes": len(dense),
        "packed_bytes": packed.stat().st_size,
        "sparse_tensors": sum(region.kind != "raw" for region in header.regions),
    }


def unpack(folder: Path, out: Path) -> dict[str, Any]:
    """Write ``out``, the plain folder that every stock tool loads, byte for byte as it was.

    :raises UserError: if the folder is not packed or is damaged, or ``out`` exists.
    :raises HostError: if the disk can't hold it; nothing is written then.
    """
    packed = packed_file(folder)
    if packed is None:
        raise UserError(f"{folder}: has no packed weights (*{SUFFIX})")
    with PackedFile(packed) as opened:
        header = opened.header
        if header.file != packed.name.removesuffix(SUFFIX):
            raise UserError(f"{packed}: holds {header.file}; it was renamed or belongs elsewhere")
        require_space(out, header.size)
        with copy_of(folder, out, [packed]) as partial:
            opened.inflate_file(partial / header.file)
            if sha256_of(partial / header.file) != header.sha256:
                raise DamagedError(f"{packed}: what it holds is not the file that was packed")
            rewrite_card(partial)
    return {"dense_bytes": header.size, "packed_bytes": packed.stat().st_size}


def _copy(files: list[Path], folder: Path, out: Path) -> None:
    for file in files:
        place = out / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


@contextmanager
def copy_of(folder: Path, out: Path, without: list[Path]) -> Iterator[Path]:
    """A copy of a deployment but for some files, that becomes ``out`` once it is whole.

    :raises UserError: if ``out`` exists or lies within, or the folder holds what is no file of it.
    """
    files = [file for file in files_inside(folder) if file not in without]
    with _fresh(out, folder) as partial:
        _copy(files, folder, partial)
        yield partial


@contextmanager
def _fresh(out: Path, source: Path) -> Iterator[Path]:
    """An empty folder that becomes ``out`` once it is whole, and is gone if it never is."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already")
    if real_path(out).is_relative_to(real_path(source)):
        raise UserError(f"{out}: lies within {source}, which is to be copied")
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
