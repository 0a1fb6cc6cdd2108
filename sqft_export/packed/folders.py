"""Pack a deployment folder, and unpack it again to the same bytes.

A packed folder has ``<weights>.sqft`` in place of ``<weights>``, and its model card shows the code
for a packed folder. All other files are copied unchanged.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import numpy as np

from sqft_export.artifacts.store import sha256_of
from sqft_export.errors import DamagedError, UserError
from sqft_export.machine.host import require_space
from sqft_export.packed.container import PackedFile, Writer, read_fills
from sqft_export.packed.inflate import Memory
from sqft_export.packed.regions import StoredBlocks, find_regions
from sqft_export.packed.usage import rewrite_card
from sqft_export.targets.folder import SUFFIX, check_files, graph_and_weights
from sqft_export.untrusted import fault_of_file, files_inside, real_path

# Folders next to the plain deployment, in the artifact of an export.
PACKED = "packed"
SPARSE = "sparse"


class PackedSizes(TypedDict):
    """Sizes before and after packing, in bytes."""

    dense_bytes: int
    packed_bytes: int


class PackedTensors(PackedSizes):
    """Sizes, and the number of tensors that are stored sparse."""

    sparse_tensors: int


def packed_file(folder: Path) -> Path | None:
    """Return the packed weight file of a folder; None if its weights are dense."""
    _, weights = graph_and_weights(folder)
    packed = weights.with_name(weights.name + SUFFIX)
    return packed if packed.is_file() else None


def map_weights(file: Path) -> np.ndarray:
    """Map a weight file into memory (uint8).

    :raises UserError: if it is missing, empty or not a regular file.
    """
    if fault := fault_of_file(file):
        raise UserError(f"{file}: {fault if os.path.lexists(file) else 'is missing'}")
    if not file.stat().st_size:
        raise UserError(f"{file}: is empty")
    return np.memmap(file, np.uint8, mode="r")


def dense_size(folder: Path) -> int:
    """Return the size in bytes of a deployment's dense weight file, packed or plain.

    :raises UserError: if the folder has no weight file, packed or plain.
    """
    if packed := packed_file(folder):
        with PackedFile(packed) as opened:
            return opened.header.size
    return len(map_weights(graph_and_weights(folder)[1]))


def pack(folder: Path, out: Path, entropy: bool = False) -> PackedTensors:
    """Write a packed copy of a deployment to ``out``.

    :param entropy: also compress with zstd: smaller files that load more slowly.
    :raises UserError: if the folder is not a plain deployment or contains links or devices, or if
        ``out`` exists or is inside the folder.
    :raises NothingSaved: if the copy would not be smaller.
    """
    graph, weights = graph_and_weights(folder)
    if not os.path.lexists(weights):
        raise UserError(f"{weights}: is missing; a dense deployment is expected")
    check_files(folder)
    with copy_deployment(folder, out, [weights]) as partial:
        sizes = _pack_weights(graph, weights, partial / (weights.name + SUFFIX), entropy)
        if sizes["packed_bytes"] >= sizes["dense_bytes"]:
            raise NothingSaved(
                f"{weights}: has {sizes['dense_bytes']:,} bytes, packed it would have "
                f"{sizes['packed_bytes']:,}; it was not packed"
            )
        rewrite_card(partial)
    return sizes


class NothingSaved(UserError):
    """Raised when a packed copy would not be smaller."""


def _pack_weights(graph: Path, weights: Path, packed: Path, entropy: bool) -> PackedTensors:
    """Write the packed weight file and return sizes as :func:`pack` does."""
    dense, found = map_weights(weights), find_regions(graph, weights)
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
            read_fills(region.fill, Memory(dense).read),
            region.group,
        )
    writer.raw(end, dense[end:])
    header = writer.finish(weights.name, len(dense), sha256_of(weights))
    PackedFile(packed).close()  # raises an error if it could not be unpacked again
    return {
        "dense_bytes": len(dense),
        "packed_bytes": packed.stat().st_size,
        "sparse_tensors": sum(region.kind != "raw" for region in header.regions),
    }


def unpack(folder: Path, out: Path) -> PackedSizes:
    """Write the plain folder, which every stock tool loads, to ``out``.

    The weights get the bytes that they had before packing.

    :raises UserError: if the folder is not packed or is damaged, or ``out`` exists.
    :raises HostError: if the disk is too small; nothing is written then.
    """
    packed = packed_file(folder)
    if packed is None:
        raise UserError(f"{folder}: has no packed weights (*{SUFFIX})")
    with PackedFile(packed) as opened:
        header = opened.header
        if header.file != packed.name.removesuffix(SUFFIX):
            raise UserError(f"{packed}: holds {header.file}; it was renamed or belongs elsewhere")
        require_space(out, header.size)
        with copy_deployment(folder, out, [packed]) as partial:
            opened.inflate_file(partial / header.file)
            if sha256_of(partial / header.file) != header.sha256:
                raise DamagedError(f"{packed}: its content differs from the file that was packed")
            rewrite_card(partial)
    return {"dense_bytes": header.size, "packed_bytes": packed.stat().st_size}


def _copy_files(files: list[Path], folder: Path, out: Path) -> None:
    for file in files:
        place = out / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


@contextmanager
def copy_deployment(folder: Path, out: Path, without: list[Path]) -> Iterator[Path]:
    """Copy a deployment without some files; yield the copy, which is renamed to ``out`` at the end.

    :raises UserError: if ``out`` exists or is inside the folder, or the folder contains links or
        devices.
    """
    files = [file for file in files_inside(folder) if file not in without]
    with _create_folder(out, folder) as partial:
        _copy_files(files, folder, partial)
        yield partial


@contextmanager
def _create_folder(out: Path, source: Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to ``out`` at the end, or removed after an error."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already")
    if real_path(out).is_relative_to(real_path(source)):
        raise UserError(f"{out}: lies within {source}, the folder to copy")
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
