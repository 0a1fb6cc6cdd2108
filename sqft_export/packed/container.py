"""The packed weight file, ``<weights>.sqft``, as docs/reference/sparse-format.md describes it.

    8 bytes    magic SQFTPACK
    8 bytes    length of the header
    header     JSON, see ``Header``
    16 bytes   XXH3-128 of the header
    payload    pieces, each from a multiple of 64 bytes on

A packed file stands for one dense weight file, byte for byte. It is a row of regions that cover
that file: ``raw`` bytes, ``sparse`` tensors as mask and kept codes, and ``blocks``, the same of
ggml's tensors. Every piece has its digest; a file that is cut, flipped or inconsistent is refused
before a byte of it is used.
"""

import bisect
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import xxhash
from pydantic import BaseModel, ConfigDict, Field

from sqft_export.errors import DamagedError, UserError, one_line
from sqft_export.numerics.codes import round_up
from sqft_export.packed import blocks
from sqft_export.packed.inflate import Bytes, DenseFile, Memory, deflate, inflate
from sqft_export.run.host import allowed_processors
from sqft_export.run.threads import map_in_order
from sqft_export.untrusted import open_regular, parse_json

MAGIC = b"SQFTPACK"
FORMAT = 1
ALIGNMENT = 64
FRAME = 2**20  # bytes of a piece that are compressed together
RAW_BYTES = 2**26  # of one raw region, so that threads share a long one
LARGEST = 2**48
MAX_HEADER_BYTES = 2**27
MOST_REGIONS = 50_000
MAX_GROUP = 2**22  # elements that share a zero point, where not all of a tensor do
INFLATION = 256  # times its stored bytes that a file may stand for; sparse INT4 stands for four
ZSTD_LEVEL = 6
Count = Annotated[int, Field(ge=0, lt=LARGEST)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class HeaderPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Piece(HeaderPart):
    """Bytes in the payload.

    at, size: where they are stored, from the start of the payload.
    bytes: their number once decompressed.
    frames: stored sizes of the zstd frames they are compressed in, ``FRAME`` bytes each; None: as
    they are.
    """

    at: Count
    size: Count
    bytes: Count
    xxh3_128: Digest
    frames: tuple[Count, ...] | None = None


class ZeroPoints(HeaderPart):
    """Where in the dense file the fill of every group is: ``rows`` rows of ``per_row`` elements.

    row_bytes: from one row to the next.
    """

    at: Count
    bits: Literal[4, 8]
    rows: Count
    per_row: Count
    row_bytes: Count


class Raw(HeaderPart):
    """Dense bytes ``at`` to ``at + size`` as they are."""

    kind: Literal["raw"]
    at: Count
    size: Count
    data: Piece


class Sparse(HeaderPart):
    """A tensor whose elements are mostly one value, or one value a group.

    fill: that value, or where the values are; ``group`` elements share one, 0: all do.
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
    """A tensor in ggml's blocks of 32 codes behind their float16 numbers.

    floats: numbers of a block. repeat: blocks in a row that have the same.
    scales: the numbers, once for each ``repeat`` blocks.
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
    """``file``, ``size``, ``sha256``: of the dense file; the regions cover it in order."""

    version: Literal[1]
    file: Annotated[str, Field(pattern=r"^[^/\\\x00]+$")]
    size: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    regions: tuple[Region, ...]


def _aligned(offset: int) -> int:
    return round_up(offset, ALIGNMENT)


def _digest(data: Any) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _compress(frame: memoryview) -> bytes:
    """A zstd frame; a compressor serves one thread at a time."""
    import zstandard

    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(frame)


class Writer:
    """Writes a packed file: regions in order, header last, one rename.

    :param entropy: compress every piece that gets smaller by it.
    """

    def __init__(self, file: Path, entropy: bool):
        self.file, self.entropy = file, entropy
        self.scratch = file.with_name(file.name + ".payload")
        self.stream = self.scratch.open("wb")
        self.regions: list[Raw | Sparse | Blocks] = []

    def piece(self, data: Bytes) -> Piece:
        stored, frames = np.ascontiguousarray(data).data, None
        if self.entropy and len(data):
            frames_of = (stored[i : i + FRAME] for i in range(0, len(data), FRAME))
            parts = list(map_in_order(_compress, frames_of))
            if sum(map(len, parts)) < len(data):
                stored, frames = memoryview(b"".join(parts)), tuple(map(len, parts))
        at = _aligned(self.stream.tell())
        self.stream.seek(at)
        self.stream.write(stored)
        return Piece(
            at=at, size=len(stored), bytes=len(data), xxh3_128=_digest(stored), frames=frames
        )

    def raw(self, at: int, data: Bytes) -> None:
        for start in range(0, len(data), RAW_BYTES):
            part = data[start : start + RAW_BYTES]
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
        """Store a tensor the smaller way, sparse or raw."""
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
        """Store a tensor of ggml's blocks the smaller way.

        :param row: blocks of a row.
        """
        numbers, codes = blocks.apart(data, bits, floats)
        repeat, elements = blocks.repeats(numbers, row), len(codes) * 8 // bits
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
        self.stream.close()
        header = Header(
            version=FORMAT, file=file, size=size, sha256=sha256, regions=tuple(self.regions)
        )
        text = json.dumps(header.model_dump(exclude_none=True), separators=(",", ":")).encode()
        temporary = self.file.with_name(self.file.name + ".partial")
        with temporary.open("wb") as out, self.scratch.open("rb") as payload:
            out.write(MAGIC + len(text).to_bytes(8, "little") + text)
            out.write(xxhash.xxh3_128_digest(text))
            out.seek(_aligned(out.tell()))
            while block := payload.read(RAW_BYTES):
                out.write(block)
            out.truncate()
            out.flush()
            os.fsync(out.fileno())
        self.scratch.unlink()
        temporary.rename(self.file)
        return header


class PackedFile:
    """An opened packed file; a context manager."""

    def __init__(self, file: Path):
        """:raises UserError: if it is damaged, or of another version."""
        self.file = file
        self._stream = open_regular(file)
        try:
            self._map: Any = mmap.mmap(self._stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # an empty file can't be mapped
            self._stream.close()
            raise self.damaged("is empty") from error
        self.content = np.frombuffer(self._map, np.uint8)
        self._checked: dict[int, Bytes] = {}  # raw regions that were read
        self.header, self.payload = self._read_header()
        self._check_layout()

    def __enter__(self) -> "PackedFile":
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        # The map goes with the last array on it, which a traceback may still hold.
        del self.content, self.payload, self._map, self._checked
        self._stream.close()

    def damaged(self, what: str) -> DamagedError:
        """The error for this file, with the way out."""
        return DamagedError(f"{self.file}: {what}; copy or pack it again")

    def _read_header(self) -> tuple[Header, Bytes]:
        content = self.content
        if content[:8].tobytes() != MAGIC:
            raise self.damaged("not a packed weight file")
        length = int.from_bytes(content[8:16].tobytes(), "little")
        if length > len(content) - 32:
            raise self.damaged("is cut short")
        if length > MAX_HEADER_BYTES:
            raise self.damaged(f"its header has {length} bytes, at most {MAX_HEADER_BYTES}")
        text = content[16 : 16 + length].tobytes()
        digest = content[16 + length : 32 + length].tobytes()
        if xxhash.xxh3_128_digest(text) != digest:
            raise self.damaged("its header is damaged")
        return self._header_of(text), content[_aligned(32 + length) :]

    def _header_of(self, text: bytes) -> Header:
        try:
            document = parse_json(text, "JSON", finite=True)
        except UserError as error:
            raise self.damaged(f"its header is not one ({error})") from error
        found = document if isinstance(document, dict) else {}
        if "version" in found and found["version"] != FORMAT:
            shown = one_line(repr(found["version"]), 80)
            raise UserError(f"{self.file}: version {shown}, this program reads {FORMAT}")
        regions = found.get("regions")
        if isinstance(regions, list) and len(regions) > MOST_REGIONS:
            raise self.damaged(f"{len(regions)} regions, at most {MOST_REGIONS}")
        try:
            return Header.model_validate(document)
        except pydantic.ValidationError as error:
            raise self.damaged(f"its header is not one ({_first_fault(error)})") from error

    def _check_layout(self) -> None:
        """Every size and offset against those it must fit, before anything is allocated."""
        stored = sum(piece.size for piece in self._pieces())
        head = len(self.content) - len(self.payload)
        if self.header.size > INFLATION * (stored + head):  # a hole in the file stores nothing
            raise self.damaged(f"claims to stand for {self.header.size} bytes")
        raw = [r for r in self.header.regions if isinstance(r, Raw)]
        self._raw_starts, self._raw = [r.at for r in raw], raw
        end = 0
        for region in self.header.regions:
            if region.size == 0 and len(self.header.regions) > 1:
                raise self.damaged(f"an empty region at byte {end}")
            if region.at != end:
                raise self.damaged(f"regions do not follow each other at byte {end}")
            end += region.size
            if isinstance(region, Raw):
                self._check_piece(region.data, region.size)
            elif isinstance(region, Blocks):
                self._check_blocks(region)
            else:
                self._check_sparse(region)
        if end != self.header.size:
            raise self.damaged(f"regions cover {end} of {self.header.size} bytes")
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
        """No bytes belong to two pieces, which would let a small file stand for a large one."""
        end = 0
        for piece in sorted(self._pieces(), key=lambda piece: (piece.at, piece.size)):
            if piece.size and piece.at < end:
                raise self.damaged(f"two pieces share byte {piece.at} of the payload")
            end = max(end, piece.at + piece.size)

    def _check_blocks(self, region: Blocks) -> None:
        count, rest = divmod(region.elements, blocks.BLOCK)
        whole = not rest and count % region.repeat == 0
        if not whole or region.size != count * blocks.block_bytes(region.bits, region.floats):
            raise self.damaged(f"{region.name}: size and number of elements do not fit")
        self._check_piece(region.scales, count // region.repeat * 2 * region.floats)
        self._check_mask(region, region.elements * region.bits // 8)

    def _check_mask(self, region: Sparse | Blocks, size: int) -> None:
        """:param size: bytes of all elements."""
        self._check_piece(region.mask, -(-region.elements // 8))
        # At most all elements are kept, and every chunk may end in a half byte.
        if region.kept.bytes > size:
            raise self.damaged(f"{region.name}: more kept codes than elements")
        self._check_piece(region.kept, region.kept.bytes)

    def _check_sparse(self, region: Sparse) -> None:
        if region.size != -(-region.elements * region.bits // 8):
            raise self.damaged(f"{region.name}: size and number of elements do not fit")
        self._check_mask(region, region.size)
        zeros = region.fill
        if isinstance(zeros, int):
            if region.group or zeros >= 2**region.bits:
                raise self.damaged(f"{region.name}: fill {zeros} is none of its elements")
            return
        if not region.group or zeros.rows * zeros.per_row * region.group < region.elements:
            raise self.damaged(f"{region.name}: fewer zero points than groups")
        if MAX_GROUP < region.group < region.elements:
            raise self.damaged(f"{region.name}: groups of {region.group} elements")
        if zeros.row_bytes < -(-zeros.per_row * zeros.bits // 8) or zeros.bits > region.bits:
            raise self.damaged(f"{region.name}: its zero points do not fit")
        end = zeros.at + zeros.rows * zeros.row_bytes
        before = bisect.bisect_right(self._raw_starts, zeros.at) - 1
        if before < 0 or end > self._raw[before].at + self._raw[before].size:
            raise self.damaged(f"{region.name}: its zero points are not in one raw region")

    def _check_piece(self, piece: Piece, expected: int) -> None:
        if piece.bytes != expected or piece.at + piece.size > len(self.payload):
            raise self.damaged("a piece is cut short or of the wrong size")
        if piece.frames is None:
            if piece.size != piece.bytes:
                raise self.damaged("a piece is of the wrong size")
        elif sum(piece.frames) != piece.size or len(piece.frames) != -(-piece.bytes // FRAME):
            raise self.damaged("frames do not fill their piece")

    def inflate(self, out: Bytes | None = None, threads: int | None = None) -> Bytes:
        """The dense file's bytes; every piece checked against its digest.

        :param out: where to write them, ``header.size`` long; None for a new array.
        :raises UserError: naming the tensor that is damaged.
        """
        out = np.empty(self.header.size, np.uint8) if out is None else out
        self._write(Memory(out), threads)
        return out

    def inflate_checked(self, out: Bytes | None = None) -> Bytes:
        """The same, and the whole against the digest of the file that was packed.

        :raises DamagedError: if it is another file.
        """
        out = self.inflate(out)
        if hashlib.sha256(out.data).hexdigest() != self.header.sha256:
            raise self.damaged("what it holds is not the file that was packed")
        return out

    def inflate_file(self, file: Path, threads: int | None = None) -> None:
        """The dense file itself; a chunk a thread is in memory.

        :raises UserError: naming the tensor that is damaged.
        """
        with file.open("w+b", buffering=0) as stream:
            if self.header.size and hasattr(os, "posix_fallocate"):
                # Full disks show now, and what is claimed at once is written a third faster.
                os.posix_fallocate(stream.fileno(), 0, self.header.size)
            self._write(DenseFile(stream), threads)

    def read(self, at: int, size: int) -> Bytes:
        """Bytes ``at`` to ``at + size`` of the dense file, which lie in one region.

        :raises UserError: naming the tensor that is damaged, or if the file has no such bytes.
        """
        region = next((r for r in self.header.regions if r.at <= at < r.at + r.size), None)
        if not size:
            return np.empty(0, np.uint8)
        if region is None or at + size > region.at + region.size:
            return self._read_over(at, size)
        if isinstance(region, Raw):
            return self._raw_bytes(region)[at - region.at : at - region.at + size]
        out = Memory(np.empty(region.size, np.uint8))
        with ThreadPoolExecutor(allowed_processors()) as pool:
            if isinstance(region, Blocks):
                self._inflate_blocks(region, out, 0, pool)
            else:
                self._finish((region, self._inflate(region, out, 0, self.read, pool)))
        return out.read(at - region.at, size)

    def _read_over(self, at: int, size: int) -> Bytes:
        """The same over several regions."""
        if at < 0 or at + size > self.header.size:
            raise self.damaged(f"has no bytes {at} to {at + size}")
        parts, end = [], at + size
        for region in self.header.regions:
            first, last = max(at, region.at), min(end, region.at + region.size)
            if first < last:
                parts.append(self.read(first, last - first))
        return np.concatenate(parts)

    def _raw_bytes(self, region: Raw) -> Bytes:
        """Checked once, however many tensors lie in it."""
        if region.at not in self._checked:
            self._checked[region.at] = self._bytes(region.data, f"byte {region.at}")
        return self._checked[region.at]

    def _write(self, out: Memory | DenseFile, threads: int | None) -> None:
        # One more than processors: one waits for its turn to write.
        with ThreadPoolExecutor(threads or 1 + allowed_processors()) as pool:
            raw = [r for r in self.header.regions if isinstance(r, Raw)]
            # Zero points are in raw regions, which therefore come first.
            for _ in pool.map(lambda region: self._copy(region, out), raw):
                pass
            before: tuple[Sparse, list[Future[None]]] | None = None
            for region in self.header.regions:
                if isinstance(region, Sparse):
                    # One is checked while the one before it is written.
                    started = region, self._inflate(region, out, region.at, out.read, pool)
                    self._finish(before)
                    before = started
                elif isinstance(region, Blocks):
                    self._inflate_blocks(region, out, region.at, pool)
            self._finish(before)

    def _finish(self, started: tuple[Sparse, list[Future[None]]] | None) -> None:
        if started:
            region, tasks = started
            for task in tasks:
                task.result()
            self.forget(region.mask)
            self.forget(region.kept)

    def _copy(self, region: Raw, out: Memory | DenseFile) -> None:
        out.write(region.at, self._bytes(region.data, f"byte {region.at}"))
        self.forget(region.data)

    def _inflate(
        self,
        region: Sparse,
        out: Memory | DenseFile,
        at: int,
        dense: Callable[[int, int], Bytes],
        pool: Executor,
    ) -> list[Future[None]]:
        mask = self._bytes(region.mask, region.name, pool)
        kept = self._bytes(region.kept, region.name, pool)
        fill = fills_of(region.fill, dense)
        try:
            return inflate(
                region.bits, region.elements, mask, kept, fill, region.group, out, at, pool
            )
        except ValueError as error:
            raise self.damaged(f"{region.name}: {error}") from error

    def _inflate_blocks(
        self, region: Blocks, out: Memory | DenseFile, at: int, pool: Executor
    ) -> None:
        """One tensor is in memory twice."""
        pieces = (region.scales, region.mask, region.kept)
        scales, mask, kept = (self._bytes(piece, region.name, pool) for piece in pieces)
        numbers = scales.view(np.float16).reshape(-1, region.floats)
        fills = blocks.zero_codes(numbers, region.bits)
        group = blocks.BLOCK * region.repeat if len(fills) > 1 else 0
        codes = Memory(np.empty(region.elements * region.bits // 8, np.uint8))
        try:
            tasks = inflate(region.bits, region.elements, mask, kept, fills, group, codes, 0, pool)
        except ValueError as error:
            raise self.damaged(f"{region.name}: {error}") from error
        for task in tasks:
            task.result()
        out.write(at, blocks.joined(numbers, codes.array, region.repeat, region.bits))
        for piece in pieces:
            self.forget(piece)

    def forget(self, piece: Piece) -> None:
        """Take a piece's pages out of this process; the system may keep them cached."""
        start = len(self.content) - len(self.payload) + piece.at
        first = round_up(start, mmap.PAGESIZE)
        length = (start + piece.size) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, length)

    def stored_bytes(self, piece: Piece, name: str) -> Bytes:
        """A piece as it is stored, checked against its digest.

        :raises DamagedError: if it is damaged.
        """
        stored = self.payload[piece.at : piece.at + piece.size]
        if _digest(stored) != piece.xxh3_128:
            raise self.damaged(f"{name}: is damaged")
        return stored

    def _bytes(self, piece: Piece, name: str, pool: Executor | None = None) -> Bytes:
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
            yield stored[at : at + size], out[index * FRAME : (index + 1) * FRAME]
            at += size

    def decompress(self, name: str, frame: Bytes, out: Bytes) -> None:
        """Decompress one frame of a piece into ``out``, whose length it must have.

        :raises DamagedError: if it is damaged or has another length.
        """
        import zstandard

        try:
            if zstandard.frame_content_size(frame.data) != len(out):
                raise self.damaged(f"{name}: a frame is of the wrong size")
            data = zstandard.ZstdDecompressor().decompress(frame.data, max_output_size=len(out))
        except zstandard.ZstdError as error:
            raise self.damaged(f"{name}: {error}") from error
        out[:] = np.frombuffer(data, np.uint8)


def _first_fault(error: pydantic.ValidationError) -> str:
    """The first of the faults of a header, and how many there are."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    place = ".".join(map(str, found[0]["loc"]))
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return one_line(f"{place}: {found[0]['msg']}") + more


def fills_of(fill: int | ZeroPoints, dense: Callable[[int, int], Bytes]) -> np.ndarray:
    """uint32: the fill, or that of every group.

    :param dense: offset and size -> the dense file's bytes there.
    """
    if isinstance(fill, int):
        return np.array([fill], np.uint32)
    stored = dense(fill.at, fill.rows * fill.row_bytes)
    rows = stored.reshape(fill.rows, fill.row_bytes)
    if fill.bits == 4:
        rows = np.stack([rows & 15, rows >> 4], axis=-1).reshape(fill.rows, -1)
    return np.ascontiguousarray(rows[:, : fill.per_row]).reshape(-1).astype(np.uint32)
