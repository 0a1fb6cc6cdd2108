"""The digest of the dense file that a container stands for, computed from small parts of it.

A container may be made so that it stands for 256 times its own bytes. Here at most a few MiB of the
dense file are in memory, however long its tensors are; a loader holds all of it.
"""

import hashlib
from collections.abc import Iterator
from math import lcm

import numpy as np

from sqft_export.packed import blocks
from sqft_export.packed.container import FRAME, Blocks, PackedFile, Piece, Raw, Sparse, ZeroPoints
from sqft_export.packed.inflate import CHUNK, Bytes, inflate_chunk, kept_bytes


class PieceReader:
    """Bytes of a piece at any place, one decompressed frame in memory."""

    def __init__(self, opened: PackedFile, piece: Piece, name: str):
        self.opened, self.piece, self.name = opened, piece, name
        self.stored = opened.stored_bytes(piece, name)
        self.starts = np.concatenate([[0], np.cumsum(piece.frames or ())]).astype(int)
        self.number, self.frame = -1, np.empty(0, np.uint8)

    def read(self, start: int, stop: int) -> Bytes:
        """uint8 ``[stop - start]``.

        :raises DamagedError: if the piece ends before, or a frame is damaged.
        """
        if stop > self.piece.bytes:
            raise self.opened.damaged(f"{self.name}: is cut short")
        if self.piece.frames is None:
            return self.stored[start:stop]
        parts = [np.empty(0, np.uint8)]
        for number in range(start // FRAME, -(-stop // FRAME)):
            first = number * FRAME
            parts.append(self._frame(number)[max(0, start - first) : stop - first])
        return np.concatenate(parts)

    def _frame(self, number: int) -> Bytes:
        if number != self.number:
            size = min(FRAME, self.piece.bytes - number * FRAME)
            stored = self.stored[self.starts[number] : self.starts[number + 1]]
            self.frame, self.number = np.empty(size, np.uint8), number
            self.opened.decompress(self.name, stored, self.frame)
        return self.frame


def check_whole(opened: PackedFile) -> None:
    """Compare the digest of the dense file with that of the file that was packed.

    :raises DamagedError: naming the tensor that is damaged, or if it is another file.
    """
    digest = hashlib.sha256()
    for region in opened.header.regions:
        for part in _dense_parts(opened, region):
            digest.update(np.ascontiguousarray(part).data)
    if digest.hexdigest() != opened.header.sha256:
        raise opened.damaged("what it holds is not the file that was packed")


def _dense_parts(opened: PackedFile, region: Raw | Sparse | Blocks) -> Iterator[Bytes]:
    if isinstance(region, Raw):
        yield from _raw_parts(opened, region)
    elif isinstance(region, Blocks):
        yield from _block_parts(opened, region)
    else:
        yield from _sparse_parts(opened, region)


def _raw_parts(opened: PackedFile, region: Raw) -> Iterator[Bytes]:
    reader = PieceReader(opened, region.data, f"byte {region.at}")
    for start in range(0, region.size, FRAME):
        yield reader.read(start, min(start + FRAME, region.size))
    opened.forget(region.data)


class _Codes:
    """Mask and kept codes of a tensor, a chunk after the other."""

    def __init__(self, opened: PackedFile, region: Sparse | Blocks):
        self.opened, self.region = opened, region
        self.mask = PieceReader(opened, region.mask, region.name)
        self.kept = PieceReader(opened, region.kept, region.name)
        self.at = 0  # bytes of kept codes that were read

    def chunk(self, first: int, fills: np.ndarray, group: int, offset: int) -> Bytes:
        """Dense bytes of the chunk of ``CHUNK`` elements that begins with ``first``.

        :param fills: of the groups from element ``first - offset`` on.
        """
        region, count = self.region, min(CHUNK, self.region.elements - first)
        mask = self.mask.read((first - offset) // 8, -(-(first + count) // 8))
        own = mask[offset // 8 :]
        if (first + count) % 8 and own[-1] >> ((first + count) % 8):
            raise self.opened.damaged(f"{region.name}: mask has bits past its end")
        size = sum(kept_bytes(own, count, region.bits))
        kept = self.kept.read(self.at, self.at + size)
        self.at += size
        return inflate_chunk(region.bits, mask, offset, count, kept, fills, group)

    def finish(self) -> None:
        """:raises DamagedError: if there are more kept codes than the mask announces."""
        if self.at != self.region.kept.bytes:
            raise self.opened.damaged(f"{self.region.name}: has codes that no mask announces")
        self.opened.forget(self.region.mask)
        self.opened.forget(self.region.kept)


def _sparse_parts(opened: PackedFile, region: Sparse) -> Iterator[Bytes]:
    codes, fill = _Codes(opened, region), region.fill
    group = 0 if region.group >= region.elements else region.group
    zeros = _ZeroReader(opened, fill) if isinstance(fill, ZeroPoints) else None
    for first in range(0, region.elements, CHUNK):
        # A mask begins on a byte, and a fill with its group.
        offset = first % lcm(8, group) if group else 0
        start, stop = (first - offset, min(first + CHUNK, region.elements)) if group else (0, 1)
        if zeros is None:
            fills = np.array([fill], np.uint32)
        else:
            size = group or 1
            fills = zeros.fills(start // size, -(-stop // size))
        yield codes.chunk(first, fills, group, offset)
    codes.finish()


class _ZeroReader:
    """Zero points of groups, out of the raw region that they lie in."""

    def __init__(self, opened: PackedFile, zeros: ZeroPoints):
        self.zeros = zeros
        end = zeros.at + zeros.rows * zeros.row_bytes
        regions = [r for r in opened.header.regions if isinstance(r, Raw)]
        region = next(r for r in regions if r.at <= zeros.at and end <= r.at + r.size)
        self.reader = PieceReader(opened, region.data, f"byte {region.at}")
        self.at = zeros.at - region.at

    def fills(self, first: int, last: int) -> np.ndarray:
        """uint32 of groups ``first`` to ``last``."""
        zeros, groups = self.zeros, np.arange(first, last)
        columns = groups % zeros.per_row
        places = groups // zeros.per_row * zeros.row_bytes + columns * zeros.bits // 8
        start, stop = self.at + int(places[0]), self.at + int(places[-1]) + 1
        found = self.reader.read(start, stop)[places - places[0]]
        if zeros.bits == 4:
            found = found >> (columns % 2 * 4).astype(np.uint8) & 15
        return found.astype(np.uint32)


def _block_parts(opened: PackedFile, region: Blocks) -> Iterator[Bytes]:
    codes, width = _Codes(opened, region), 2 * region.floats
    scales = PieceReader(opened, region.scales, region.name)
    for first in range(0, region.elements, CHUNK):
        last = min(first + CHUNK, region.elements)
        places = np.arange(first // blocks.BLOCK, last // blocks.BLOCK) // region.repeat
        stored = scales.read(int(places[0]) * width, (int(places[-1]) + 1) * width)
        numbers = stored.reshape(-1, width)[places - places[0]].view(np.float16)
        fills = blocks.zero_codes(numbers, region.bits)
        group = blocks.BLOCK if len(fills) > 1 else 0
        dense = codes.chunk(first, fills, group, 0)
        yield blocks.joined(np.ascontiguousarray(numbers), dense, 1, region.bits)
    codes.finish()
    opened.forget(region.scales)
