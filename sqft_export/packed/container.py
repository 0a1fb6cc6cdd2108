"""Write and read packed weight files, ``<weights>.sqft`` (docs/reference/sparse-format.md).

    8 bytes    magic SQFTPACK
    8 bytes    length of the header
    header     JSON, see ``Header``
    16 bytes   XXH3-128 of the header
    payload    pieces, each aligned to 64 bytes

A packed file reproduces one dense weight file, byte for byte. Its regions cover that file in order:
``raw`` bytes, ``sparse`` tensors (mask and kept codes), and ``blocks`` (mask and kept codes of
ggml's tensors). Every piece has a digest. A truncated, altered or inconsistent file is refused
before any of its bytes is used.
"""

import bisect
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic
import xxhash
from pydantic import BaseModel, ConfigDict, Field

from sqft_export.errors import DamagedError, UserError, one_line
from sqft_export.machine.host import allowed_processors
from sqft_export.machine.threads import map_in_order
from sqft_export.numerics.codes import round_up
from sqft_export.packed import blocks
from sqft_export.packed.inflate import Bytes, DenseFile, Memory, deflate, inflate
from sqft_export.untrusted import open_regular, parse_json

MAGIC = b"SQFTPACK"
FORMAT_VERSION = 1
ALIGNMENT = 64
FRAME_BYTES = 2**20  # of a piece, in one zstd frame
MAX_RAW_REGION_BYTES = 2**26  # longer ones are cut, so that several threads can write them
MAX_FILE_BYTES = 2**48
MAX_HEADER_BYTES = 2**27
MAX_REGIONS = 50_000
MAX_GROUP_ELEMENTS = 2**22  # per zero point, unless the whole tensor shares one
MAX_INFLATION_RATIO = 256  # dense bytes per stored byte; sparse INT4 has about 4
ZSTD_LEVEL = 6
Count = Annotated[int, Field(ge=0, lt=MAX_FILE_BYTES)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class HeaderPart(BaseModel):
    """Base of the header's models: immutable, and unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Piece(HeaderPart):
    """A run of bytes in the payload.

    at, size: offset from the start of the payload, and stored size.
    bytes: size after decompression.
    frames: stored sizes of the zstd frames, each of ``FRAME_BYTES`` decompressed bytes; the last
        one may be shorter. None: not compressed.
    """

    at: Count
    size: Count
    bytes: Count
    xxh3_128: Digest
    frames: tuple[Count, ...] | None = None


class ZeroPoints(HeaderPart):
    """The location of the groups' zero points in the dense file.

    rows, per_row: ``rows`` rows of ``per_row`` zero points, one per group.
    row_bytes: distance from one row to the next.
    """

    at: Count
    bits: Literal[4, 8]
    rows: Count
    per_row: Count
    row_bytes: Count


class Raw(HeaderPart):
    """Bytes ``at`` to ``at + size`` of the dense file, stored unchanged in ``data``."""

    kind: Literal["raw"]
    at: Count
    size: Count
    data: Piece


class Sparse(HeaderPart):
    """A tensor most of whose elements equal one value, or one value per group.

    fill: that value, or the location of the values.
    group: consecutive elements that share a value; 0 if all elements do.
    mask, kept: one bit per element, set where it differs from its fill; and those elements.
    """

    kind: Literal["sparse"]
    name: str
    at: Count
    size: Count
    bits: Literal[4, 8, 16, 32]
    elements: Count
    fill: Annotated[int, Field(ge=0, lt=2**32)] | ZeroPoints
    group: Count
    mask: Piece
    kept: Piece


class Blocks(HeaderPart):
    """A tensor in ggml's blocks: float16 numbers, then 32 codes.

    floats: float16 numbers per block.
    repeat: consecutive blocks that have the same numbers.
    scales: the numbers, once per ``repeat`` blocks.
    """

    kind: Literal["blocks"]
    name: str
    at: Count
    size: Count
    bits: Literal[4, 8]
    elements: Count
    floats: Literal[1, 2]
    repeat: Annotated[int, Field(ge=1, lt=2**32)]
    scales: Piece
    mask: Piece
    kept: Piece


Region = Annotated[Raw | Sparse | Blocks, Field(discriminator="kind")]


class Header(HeaderPart):
    """The header of a packed file.

    file, size, sha256: name, bytes and digest of the dense file.
    regions: cover the dense file in order, without gaps.
    """

    version: Literal[1]
    file: Annotated[str, Field(pattern=r"^[^/\\\x00]+$")]
    size: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    regions: tuple[Region, ...]


def _align(offset: int) -> int:
    """Round an offset up to the alignment of pieces."""
    return round_up(offset, ALIGNMENT)


def _digest(data: memoryview) -> str:
    """Return the XXH3-128 of bytes, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


def _compress(frame: memoryview) -> bytes:
    """Return one zstd frame. A compressor serves one thread only, so each call makes its own."""
    import zstandard

    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(frame)


class Writer:
    """Write a packed file: add regions in order, then call :meth:`finish`.

    The header is written last, then the file is renamed to its final name: no partial file is
    ever visible under that name.

    :param entropy: compress each piece with zstd where that makes it smaller.
    """

    def __init__(self, file: Path, entropy: bool):
        self.file, self.entropy = file, entropy
        self.scratch = file.with_name(file.name + ".payload")
        self.stream = self.scratch.open("wb")
        self.regions: list[Raw | Sparse | Blocks] = []

    def piece(self, data: Bytes) -> Piece:
        """Append bytes to the payload and return their location."""
        stored, frames = np.ascontiguousarray(data).data, None
        if self.entropy and len(data):
            frames_of = (stored[i : i + FRAME_BYTES] for i in range(0, len(data), FRAME_BYTES))
            parts = list(map_in_order(_compress, frames_of))
            if sum(map(len, parts)) < len(data):
                stored, frames = memoryview(b"".join(parts)), tuple(map(len, parts))
        at = _align(self.stream.tell())
        self.stream.seek(at)
        self.stream.write(stored)
        return Piece(
            at=at, size=len(stored), bytes=len(data), xxh3_128=_digest(stored), frames=frames
        )

    def raw(self, at: int, data: Bytes) -> None:
        """Store bytes from offset ``at`` of the dense file unchanged."""
        for start in range(0, len(data), MAX_RAW_REGION_BYTES):
            part = data[start : start + MAX_RAW_REGION_BYTES]
            piece = self.piece(part)
            self.regions.append(Raw(kind="raw", at=at + start, size=len(part), data=piece))

    def sparse(
        self,
        name: str,
        at: int,
        data: Bytes,
        bits: int,
        elements: int,
        fill: int | ZeroPoints,
        fills: np.ndarray,
        group: int,
    ) -> None:
        """Store a tensor as sparse or raw, whichever is smaller.

        :param fills: uint32, the values of ``fill``: one, or one per group.
        """
        mask, kept = deflate(bits, elements, data, fills, group)
        if len(mask) + len(kept) >= len(data):
            self.raw(at, data)
            return
        self.regions.append(
            Sparse(
                kind="sparse",
                name=name,
                at=at,
                size=len(data),
                bits=bits,  # type: ignore[arg-type]
                elements=elements,
                fill=fill,
                group=group,
                mask=self.piece(mask),
                kept=self.piece(kept),
            )
        )

    def blocks(self, name: str, at: int, data: Bytes, bits: int, floats: int, row: int) -> None:
        """Store a tensor of ggml's blocks as blocks or raw, whichever is smaller.

        :param row: blocks per row of the tensor.
        """
        numbers, codes = blocks.split_blocks(data, bits, floats)
        repeat, elements = blocks.count_repeats(numbers, row), len(codes) * 8 // bits
        numbers = numbers[::repeat]
        fills = blocks.zero_codes(numbers, bits)
        group = blocks.BLOCK * repeat if len(fills) > 1 else 0
        mask, kept = deflate(bits, elements, codes, fills, group)
        scales = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1)
        if len(scales) + len(mask) + len(kept) >= len(data):
            self.raw(at, data)
            return
        self.regions.append(
            Blocks(
                kind="blocks",
                name=name,
                at=at,
                size=len(data),
                bits=bits,  # type: ignore[arg-type]
                elements=elements,
                floats=floats,  # type: ignore[arg-type]
                repeat=repeat,
                scales=self.piece(scales),
                mask=self.piece(mask),
                kept=self.piece(kept),
            )
        )

    def finish(self, file: str, size: int, sha256: str) -> Header:
        """Write header and payload, and rename the result to its final name.

        :param file: name of the dense file; ``size`` and ``sha256`` are its bytes and digest.
        """
        self.stream.close()
        header = Header(
            version=FORMAT_VERSION, file=file, size=size, sha256=sha256, regions=tuple(self.regions)
        )
        text = json.dumps(header.model_dump(exclude_none=True), separators=(",", ":")).encode()
        temporary = self.file.with_name(self.file.name + ".partial")
        with temporary.open("wb") as out, self.scratch.open("rb") as payload:
            out.write(MAGIC + len(text).to_bytes(8, "little") + text)
            out.write(xxhash.xxh3_128_digest(text))
            out.seek(_align(out.tell()))
            while block := payload.read(MAX_RAW_REGION_BYTES):
                out.write(block)
            out.truncate()
            out.flush()
            os.fsync(out.fileno())
        self.scratch.unlink()
        temporary.rename(self.file)
        return header


class PackedFile:
    """An opened, memory-mapped packed file; a context manager.

    :raises UserError: if the file is damaged, or has another format version.
    """

    def __init__(self, file: Path):
        self.file = file
        self._stream = open_regular(file)
        try:
            self._map = mmap.mmap(self._stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # an empty file can't be mapped
            self._stream.close()
            raise self.damage_error("is empty") from error
        self.content = np.frombuffer(self._map, np.uint8)
        self._checked_raw: dict[int, Bytes] = {}  # by offset: raw regions whose digest was checked
        self.header, self.payload = self._read_header()
        self._check_layout()

    def __enter__(self) -> "PackedFile":
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        # The map is freed with the last array on it. A traceback may still hold one.
        del self.content, self.payload, self._map, self._checked_raw
        self._stream.close()

    def damage_error(self, what: str) -> DamagedError:
        """Return the error to raise for this file; ``what`` completes its message."""
        return DamagedError(f"{self.file}: {what}; copy or pack it again")

    def _read_header(self) -> tuple[Header, Bytes]:
        content = self.content
        if content[:8].tobytes() != MAGIC:
            raise self.damage_error("not a packed weight file")
        length = int.from_bytes(content[8:16].tobytes(), "little")
        if length > len(content) - 32:
            raise self.damage_error("is cut short")
        if length > MAX_HEADER_BYTES:
            raise self.damage_error(f"its header has {length} bytes, at most {MAX_HEADER_BYTES}")
        text = content[16 : 16 + length].tobytes()
        digest = content[16 + length : 32 + length].tobytes()
        if xxhash.xxh3_128_digest(text) != digest:
            raise self.damage_error("its header is damaged")
        return self._parse_header(text), content[_align(32 + length) :]

    def _parse_header(self, text: bytes) -> Header:
        try:
            document = parse_json(text, "JSON", finite=True)
        except UserError as error:
            raise self.damage_error(f"its header is not valid ({error})") from error
        found = document if isinstance(document, dict) else {}
        if "version" in found and found["version"] != FORMAT_VERSION:
            shown = one_line(repr(found["version"]), 80)
            raise UserError(f"{self.file}: version {shown}, this program reads {FORMAT_VERSION}")
        regions = found.get("regions")
        if isinstance(regions, list) and len(regions) > MAX_REGIONS:
            raise self.damage_error(f"{len(regions)} regions, at most {MAX_REGIONS}")
        try:
            return Header.model_validate(document)
        except pydantic.ValidationError as error:
            raise self.damage_error(
                f"its header is not valid ({_describe_first_fault(error)})"
            ) from error

    def _check_layout(self) -> None:
        """Check every size and offset for consistency, before anything is allocated."""
        stored = sum(piece.size for piece in self._pieces())
        head = len(self.content) - len(self.payload)
        # Only stored bytes count, because holes of a sparse file take no space.
        if self.header.size > MAX_INFLATION_RATIO * (stored + head):
            raise self.damage_error(
                f"its dense size, {self.header.size} bytes, is more than {MAX_INFLATION_RATIO} "
                "times its stored bytes"
            )
        raw = [r for r in self.header.regions if isinstance(r, Raw)]
        self._raw_starts, self._raw = [r.at for r in raw], raw
        end = 0
        for region in self.header.regions:
            if region.size == 0 and len(self.header.regions) > 1:
                raise self.damage_error(f"an empty region at byte {end}")
            if region.at != end:
                raise self.damage_error(f"regions do not follow each other at byte {end}")
            end += region.size
            if isinstance(region, Raw):
                self._check_piece(region.data, region.size)
            elif isinstance(region, Blocks):
                self._check_blocks(region)
            else:
                self._check_sparse(region)
        if end != self.header.size:
            raise self.damage_error(f"regions cover {end} of {self.header.size} bytes")
        self._check_sharing()

    def _pieces(self) -> Iterator[Piece]:
        for region in self.header.regions:
            if isinstance(region, Raw):
                yield region.data
                continue
            if isinstance(region, Blocks):
                yield region.scales
            yield region.mask
            yield region.kept

    def _check_sharing(self) -> None:
        """Refuse pieces that overlap: with them a small file could inflate to a large one."""
        end = 0
        for piece in sorted(self._pieces(), key=lambda piece: (piece.at, piece.size)):
            if piece.size and piece.at < end:
                raise self.damage_error(f"two pieces share byte {piece.at} of the payload")
            end = max(end, piece.at + piece.size)

    def _check_blocks(self, region: Blocks) -> None:
        count, rest = divmod(region.elements, blocks.BLOCK)
        whole = not rest and count % region.repeat == 0
        if not whole or region.size != count * blocks.block_bytes(region.bits, region.floats):
            raise self.damage_error(f"{region.name}: size and number of elements do not fit")
        self._check_piece(region.scales, count // region.repeat * 2 * region.floats)
        self._check_mask(region, region.elements * region.bits // 8)

    def _check_mask(self, region: Sparse | Blocks, size: int) -> None:
        """Check mask and kept codes.

        :param size: bytes of all elements.
        """
        self._check_piece(region.mask, -(-region.elements // 8))
        # The kept codes are at most all elements. A chunk with an odd number of nibbles is padded.
        if region.kept.bytes > size:
            raise self.damage_error(f"{region.name}: more kept codes than elements")
        self._check_piece(region.kept, region.kept.bytes)

    def _check_sparse(self, region: Sparse) -> None:
        if region.size != -(-region.elements * region.bits // 8):
            raise self.damage_error(f"{region.name}: size and number of elements do not fit")
        self._check_mask(region, region.size)
        zeros = region.fill
        if isinstance(zeros, int):
            if region.group or zeros >= 2**region.bits:
                raise self.damage_error(f"{region.name}: fill {zeros} is not a value of its type")
            return
        if not region.group or zeros.rows * zeros.per_row * region.group < region.elements:
            raise self.damage_error(f"{region.name}: fewer zero points than groups")
        if MAX_GROUP_ELEMENTS < region.group < region.elements:
            raise self.damage_error(
                f"{region.name}: groups have {region.group} elements, at most {MAX_GROUP_ELEMENTS}"
            )
        if zeros.row_bytes < -(-zeros.per_row * zeros.bits // 8) or zeros.bits > region.bits:
            raise self.damage_error(f"{region.name}: sizes of its zero points are inconsistent")
        end = zeros.at + zeros.rows * zeros.row_bytes
        before = bisect.bisect_right(self._raw_starts, zeros.at) - 1
        if before < 0 or end > self._raw[before].at + self._raw[before].size:
            raise self.damage_error(f"{region.name}: its zero points are not in one raw region")

    def _check_piece(self, piece: Piece, expected: int) -> None:
        if piece.bytes != expected or piece.at + piece.size > len(self.payload):
            raise self.damage_error("a piece is cut short or of the wrong size")
        if piece.frames is None:
            if piece.size != piece.bytes:
                raise self.damage_error("a piece is of the wrong size")
        elif sum(piece.frames) != piece.size or len(piece.frames) != -(-piece.bytes // FRAME_BYTES):
            raise self.damage_error("frames do not fill their piece")

    def inflate(self, out: Bytes | None = None, threads: int | None = None) -> Bytes:
        """Return the dense file's bytes (uint8). Every piece is checked against its digest.

        :param out: uint8 ``[header.size]`` to write to; None allocates a new array.
        :raises UserError: naming the tensor that is damaged.
        """
        out = np.empty(self.header.size, np.uint8) if out is None else out
        self._write_regions(Memory(out), threads)
        return out

    def inflate_checked(self, out: Bytes | None = None) -> Bytes:
        """Return the dense file's bytes, and compare their SHA-256 with that of the packed file.

        :raises DamagedError: if the digests differ.
        """
        out = self.inflate(out)
        if hashlib.sha256(out.data).hexdigest() != self.header.sha256:
            raise self.damage_error("its content differs from the file that was packed")
        return out

    def inflate_file(self, file: Path, threads: int | None = None) -> None:
        """Write the dense file. Each thread holds one chunk in memory.

        :raises UserError: naming the tensor that is damaged.
        """
        with file.open("w+b", buffering=0) as stream:
            if self.header.size and hasattr(os, "posix_fallocate"):
                # A full disk fails here, before any work. Writing is also a third faster.
                os.posix_fallocate(stream.fileno(), 0, self.header.size)
            self._write_regions(DenseFile(stream), threads)

    def read(self, at: int, size: int) -> Bytes:
        """Return bytes ``at`` to ``at + size`` of the dense file. Fastest inside one region.

        :raises UserError: naming the tensor that is damaged, or if the file has no such bytes.
        """
        region = next((r for r in self.header.regions if r.at <= at < r.at + r.size), None)
        if not size:
            return np.empty(0, np.uint8)
        if region is None or at + size > region.at + region.size:
            return self._read_across_regions(at, size)
        if isinstance(region, Raw):
            return self._raw_bytes(region)[at - region.at : at - region.at + size]
        out = Memory(np.empty(region.size, np.uint8))
        with ThreadPoolExecutor(allowed_processors()) as pool:
            if isinstance(region, Blocks):
                self._inflate_blocks(region, out, 0, pool)
            else:
                self._finish_region((region, self._inflate(region, out, 0, self.read, pool)))
        return out.read(at - region.at, size)

    def _read_across_regions(self, at: int, size: int) -> Bytes:
        """Return bytes that span several regions."""
        if at < 0 or at + size > self.header.size:
            raise self.damage_error(f"has no bytes {at} to {at + size}")
        parts, end = [], at + size
        for region in self.header.regions:
            first, last = max(at, region.at), min(end, region.at + region.size)
            if first < last:
                parts.append(self.read(first, last - first))
        return np.concatenate(parts)

    def _raw_bytes(self, region: Raw) -> Bytes:
        """Return a raw region. Its digest is checked at the first read only."""
        if region.at not in self._checked_raw:
            self._checked_raw[region.at] = self._piece_bytes(region.data, f"byte {region.at}")
        return self._checked_raw[region.at]

    def _write_regions(self, out: Memory | DenseFile, threads: int | None) -> None:
        # One thread more than processors, because one usually waits for the write lock.
        with ThreadPoolExecutor(threads or 1 + allowed_processors()) as pool:
            raw = [r for r in self.header.regions if isinstance(r, Raw)]
            # Zero points are in raw regions, which therefore come first.
            for _ in pool.map(lambda region: self._copy(region, out), raw):
                pass
            before: tuple[Sparse, list[Future[None]]] | None = None
            for region in self.header.regions:
                if isinstance(region, Sparse):
                    # A region is checked while the previous one is written.
                    started = region, self._inflate(region, out, region.at, out.read, pool)
                    self._finish_region(before)
                    before = started
                elif isinstance(region, Blocks):
                    self._inflate_blocks(region, out, region.at, pool)
            self._finish_region(before)

    def _finish_region(self, started: tuple[Sparse, list[Future[None]]] | None) -> None:
        if started:
            region, tasks = started
            for task in tasks:
                task.result()
            self.release_pages(region.mask)
            self.release_pages(region.kept)

    def _copy(self, region: Raw, out: Memory | DenseFile) -> None:
        out.write(region.at, self._piece_bytes(region.data, f"byte {region.at}"))
        self.release_pages(region.data)

    def _inflate(
        self,
        region: Sparse,
        out: Memory | DenseFile,
        at: int,
        dense: Callable[[int, int], Bytes],
        pool: Executor,
    ) -> list[Future[None]]:
        mask = self._piece_bytes(region.mask, region.name, pool)
        kept = self._piece_bytes(region.kept, region.name, pool)
        fill = read_fills(region.fill, dense)
        try:
            return inflate(
                region.bits, region.elements, mask, kept, fill, region.group, out, at, pool
            )
        except ValueError as error:
            raise self.damage_error(f"{region.name}: {error}") from error

    def _inflate_blocks(
        self, region: Blocks, out: Memory | DenseFile, at: int, pool: Executor
    ) -> None:
        """Inflate a tensor of blocks. It is in memory twice meanwhile."""
        pieces = (region.scales, region.mask, region.kept)
        scales, mask, kept = (self._piece_bytes(piece, region.name, pool) for piece in pieces)
        numbers = scales.view(np.float16).reshape(-1, region.floats)
        fills = blocks.zero_codes(numbers, region.bits)
        group = blocks.BLOCK * region.repeat if len(fills) > 1 else 0
        codes = Memory(np.empty(region.elements * region.bits // 8, np.uint8))
        try:
            tasks = inflate(region.bits, region.elements, mask, kept, fills, group, codes, 0, pool)
        except ValueError as error:
            raise self.damage_error(f"{region.name}: {error}") from error
        for task in tasks:
            task.result()
        out.write(at, blocks.join_blocks(numbers, codes.array, region.repeat, region.bits))
        for piece in pieces:
            self.release_pages(piece)

    def release_pages(self, piece: Piece) -> None:
        """Release the resident pages of a piece. The system may keep them in its cache."""
        start = len(self.content) - len(self.payload) + piece.at
        first = round_up(start, mmap.PAGESIZE)
        length = (start + piece.size) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, length)

    def stored_bytes(self, piece: Piece, name: str) -> Bytes:
        """Return the stored bytes of a piece after checking their digest.

        :raises DamagedError: if it is damaged.
        """
        stored = self.payload[piece.at : piece.at + piece.size]
        if _digest(stored.data) != piece.xxh3_128:
            raise self.damage_error(f"{name}: is damaged")
        return stored

    def _piece_bytes(self, piece: Piece, name: str, pool: Executor | None = None) -> Bytes:
        stored = self.stored_bytes(piece, name)
        if piece.frames is None:
            return stored
        out = np.empty(piece.bytes, np.uint8)
        tasks = list(self._frames(piece, stored, out))
        for _ in (pool.map if pool else map)(lambda task: self.decompress(name, *task), tasks):
            pass
        return out

    def _frames(self, piece: Piece, stored: Bytes, out: Bytes) -> Iterator[tuple[Bytes, Bytes]]:
        at = 0
        assert piece.frames is not None
        for index, size in enumerate(piece.frames):
            yield stored[at : at + size], out[index * FRAME_BYTES : (index + 1) * FRAME_BYTES]
            at += size

    def decompress(self, name: str, frame: Bytes, out: Bytes) -> None:
        """Decompress one frame of a piece into ``out``.

        :raises DamagedError: if the frame is damaged or does not have the length of ``out``.
        """
        import zstandard

        try:
            if zstandard.frame_content_size(frame.data) != len(out):
                raise self.damage_error(f"{name}: a frame is of the wrong size")
            data = zstandard.ZstdDecompressor().decompress(frame.data, max_output_size=len(out))
        except zstandard.ZstdError as error:
            raise self.damage_error(f"{name}: {error}") from error
        out[:] = np.frombuffer(data, np.uint8)


def _describe_first_fault(error: pydantic.ValidationError) -> str:
    """Describe a header's first validation error, and count the others."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    place = ".".join(map(str, found[0]["loc"]))
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return one_line(f"{place}: {found[0]['msg']}") + more


def read_fills(fill: int | ZeroPoints, dense: Callable[[int, int], Bytes]) -> np.ndarray:
    """Return the fill values (uint32): one, or one per group.

    :param dense: returns the dense file's bytes at an offset and size.
    """
    if isinstance(fill, int):
        return np.array([fill], np.uint32)
    stored = dense(fill.at, fill.rows * fill.row_bytes)
    rows = stored.reshape(fill.rows, fill.row_bytes)
    if fill.bits == 4:
        rows = np.stack([rows & 15, rows >> 4], axis=-1).reshape(fill.rows, -1)
    return np.ascontiguousarray(rows[:, : fill.per_row]).reshape(-1).astype(np.uint32)
