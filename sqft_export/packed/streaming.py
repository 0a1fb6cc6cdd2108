"""Check the digest of a packed file's dense file, chunk by chunk.

A packed file may inflate to 256 times its own bytes. Here at most a few MiB of the dense file are
in memory, however long its tensors are. A loader, in contrast, holds the complete dense file.
"""

import hashlib
from collections.abc import Iterator
from math import lcm

import numpy as np

from sqft_export.packed import blocks
from sqft_export.packed.container import (
    FRAME_BYTES,
    Blocks,
    PackedFile,
    Piece,
    Raw,
    Sparse,
    ZeroPoints,
)
from sqft_export.packed.inflate import CHUNK, Bytes, inflate_chunk, kept_bytes


class PieceReader:
    """Read any part of a piece. One decompressed frame is in memory."""

    def __init__(self, opened: PackedFile, piece: Piece, name: str):
        self.opened, self.piece, self.name = opened, piece, name
        self.stored = opened.stored_bytes(piece, name)
        self.starts = np.concatenate([[0], np.cumsum(piece.frames or ())]).astype(int)
        self.number, self.frame = -1, np.empty(0, np.uint8)

    def read(self, start: int, stop: int) -> Bytes:
        """Return bytes ``start`` to ``stop`` of the decompressed piece (uint8).

        :raises DamagedError: if the piece is shorter, or a frame is damaged.
        """
        if stop > self.piece.bytes:
            raise self.opened.damage_error(f"{self.name}: is cut short")
        if self.piece.frames is None:
            return self.stored[start:stop]
        parts = [np.empty(0, np.uint8)]
        for number in range(start // FRAME_BYTES, -(-stop // FRAME_BYTES)):
            first = number * FRAME_BYTES
            parts.append(self._frame(number)[max(0, start - first) : stop - first])
        return np.concatenate(parts)

    def _frame(self, number: int) -> Bytes:
        if number != self.number:
            size = min(FRAME_BYTES, self.piece.bytes - number * FRAME_BYTES)
            stored = self.stored[self.starts[number] : self.starts[number + 1]]
            self.frame, self.number = np.empty(size, np.uint8), number
            self.opened.decompress(self.name, stored, self.frame)
        return self.frame


def check_dense_digest(opened: PackedFile) -> None:
    """Compare the digest of the dense file with that of the file that was packed.

    :raises DamagedError: if a tensor is damaged (it is named), or the digests differ.
    """
    digest = hashlib.sha256()
    for region in opened.header.regions:
        for part in _dense_parts(opened, region):
            digest.update(np.ascontiguousarray(part).data)
    if digest.hexdigest() != opened.header.sha256:
        raise opened.damage_error("its content differs from the file that was packed")


def _dense_parts(opened: PackedFile, region: Raw | Sparse | Blocks) -> Iterator[Bytes]:
    if isinstance(region, Raw):
        yield from _raw_parts(opened, region)
    elif isinstance(region, Blocks):
        yield from _block_parts(opened, region)
    else:
        yield from _sparse_parts(opened, region)


def _raw_parts(opened: PackedFile, region: Raw) -> Iterator[Bytes]:
    reader = PieceReader(opened, region.data, f"byte {region.at}")
    for start in range(0, region.size, FRAME_BYTES):
        yield reader.read(start, min(start + FRAME_BYTES, region.size))
    opened.release_pages(region.data)


class _CodeReader:
    """Inflate a tensor chunk by chunk, in order."""

    def __init__(self, opened: PackedFile, region: Sparse | Blocks):
        self.opened, self.region = opened, region
        self.mask = PieceReader(opened, region.mask, region.name)
        self.kept = PieceReader(opened, region.kept, region.name)
        self.at = 0  # bytes of kept codes read so far

    def chunk(self, first: int, fills: np.ndarray, group: int, offset: int) -> Bytes:
        """Return the dense bytes of the chunk that begins with element ``first``.

        :param fills: of the groups, starting with the group of element ``first - offset``.
        """
        region, count = self.region, min(CHUNK, self.region.elements - first)
        mask = self.mask.read((first - offset) // 8, -(-(first + count) // 8))
        own = mask[offset // 8 :]
        if (first + count) % 8 and own[-1] >> ((first + count) % 8):
            raise self.opened.damage_error(f"{region.name}: mask has bits past its end")
        size = sum(kept_bytes(own, count, region.bits))
        kept = self.kept.read(self.at, self.at + size)
        self.at += size
        return inflate_chunk(region.bits, mask, offset, count, kept, fills, group)

    def finish(self) -> None:
        """Check that all kept codes were used, and release their pages.

        :raises DamagedError: if there are more kept codes than the mask announces.
        """
        if self.at != self.region.kept.bytes:
            raise self.opened.damage_error(
                f"{self.region.name}: has more kept codes than its mask announces"
            )
        self.opened.release_pages(self.region.mask)
        self.opened.release_pages(self.region.kept)


def _sparse_parts(opened: PackedFile, region: Sparse) -> Iterator[Bytes]:
    codes, fill = _CodeReader(opened, region), region.fill
    group = 0 if region.group >= region.elements else region.group
    zeros = _ZeroPointReader(opened, fill) if isinstance(fill, ZeroPoints) else None
    for first in range(0, region.elements, CHUNK):
        # Start earlier, at a whole byte of the mask and the first element of a group.
        offset = first % lcm(8, group) if group else 0
        start, stop = (first - offset, min(first + CHUNK, region.elements)) if group else (0, 1)
        if zeros is None:
            fills = np.array([fill], np.uint32)
        else:
            size = group or 1
            fills = zeros.fills(start // size, -(-stop // size))
        yield codes.chunk(first, fills, group, offset)
    codes.finish()


class _ZeroPointReader:
    """Read zero points of groups from the raw region that contains them."""

    def __init__(self, opened: PackedFile, zeros: ZeroPoints):
        self.zeros = zeros
        end = zeros.at + zeros.rows * zeros.row_bytes
        regions = [r for r in opened.header.regions if isinstance(r, Raw)]
        region = next(r for r in regions if r.at <= zeros.at and end <= r.at + r.size)
        self.reader = PieceReader(opened, region.data, f"byte {region.at}")
        self.at = zeros.at - region.at

    def fills(self, first: int, last: int) -> np.ndarray:
        """Return the zero points (uint32) of groups ``first`` to ``last - 1``."""
        zeros, groups = self.zeros, np.arange(first, last)
        columns = groups % zeros.per_row
        places = groups // zeros.per_row * zeros.row_bytes + columns * zeros.bits // 8
        start, stop = self.at + int(places[0]), self.at + int(places[-1]) + 1
        found = self.reader.read(start, stop)[places - places[0]]
        if zeros.bits == 4:
            found = found >> (columns % 2 * 4).astype(np.uint8) & 15
        return found.astype(np.uint32)


def _block_parts(opened: PackedFile, region: Blocks) -> Iterator[Bytes]:
    codes, width = _CodeReader(opened, region), 2 * region.floats
    scales = PieceReader(opened, region.scales, region.name)
    for first in range(0, region.elements, CHUNK):
        last = min(first + CHUNK, region.elements)
        places = np.arange(first // blocks.BLOCK, last // blocks.BLOCK) // region.repeat
        stored = scales.read(int(places[0]) * width, (int(places[-1]) + 1) * width)
        numbers = stored.reshape(-1, width)[places - places[0]].view(np.float16)
        fills = blocks.zero_codes(numbers, region.bits)
        group = blocks.BLOCK if len(fills) > 1 else 0
        dense = codes.chunk(first, fills, group, 0)
        yield blocks.join_blocks(np.ascontiguousarray(numbers), dense, 1, region.bits)
    codes.finish()
    opened.release_pages(region.scales)
