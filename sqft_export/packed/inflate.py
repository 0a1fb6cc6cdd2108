"""Inflate mask bits and kept codes to dense codes, and deflate them again.

``unpack.c`` is compiled when the package is installed. It runs without Python's lock, so threads
work on different chunks in parallel, at memory speed. Without a compiler, numpy does the same more
slowly.
"""

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import partial
from io import RawIOBase
from pathlib import Path

import numpy as np

from sqft_export.compiled import built_library
from sqft_export.machine.threads import map_in_order

CHUNK = 2**20  # elements per call; the kept codes of each chunk start on a whole byte
Bytes = np.ndarray  # uint8 [n]


class Memory:
    """Dense bytes in an array (uint8)."""

    def __init__(self, array: Bytes):
        self.array = array

    @contextmanager
    def part(self, at: int, size: int) -> Iterator[Bytes]:
        """Yield the buffer to which ``size`` bytes at offset ``at`` are written."""
        yield self.read(at, size)

    def write(self, at: int, data: Bytes) -> None:
        """Write bytes to offset ``at``."""
        self.array[at : at + len(data)] = data

    def read(self, at: int, size: int) -> Bytes:
        """Return bytes ``at`` to ``at + size``."""
        return self.array[at : at + size]


class DenseFile:
    """Dense bytes in an unbuffered file, written from one buffer per thread.

    A memory map would cost a page fault every 4 KiB, more time than the decoding itself. The system
    runs one write to a file at a time anyway, so the lock costs nothing.
    """

    def __init__(self, stream: RawIOBase):
        self.stream = stream
        self.lock = threading.Lock()
        self.buffers = threading.local()

    @contextmanager
    def part(self, at: int, size: int) -> Iterator[Bytes]:
        """Yield the thread's buffer, then write its first ``size`` bytes to offset ``at``."""
        buffer = getattr(self.buffers, "buffer", np.empty(0, np.uint8))
        if len(buffer) < size:
            buffer = self.buffers.buffer = np.empty(size, np.uint8)
        yield buffer[:size]
        self.write(at, buffer[:size])

    def write(self, at: int, data: Bytes) -> None:
        """Write bytes to offset ``at``."""
        with self.lock:
            self.stream.seek(at)
            while len(data):
                data = data[self.stream.write(data.data) :]

    def read(self, at: int, size: int) -> Bytes:
        """Return bytes ``at`` to ``at + size``."""
        with self.lock:
            self.stream.seek(at)
            return np.frombuffer(self.stream.read(size), np.uint8)


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """Return the compiled library; None if it was not built."""
    file = built_library(Path(__file__).parent, "_unpack")
    if file is None:
        return None
    library = ctypes.CDLL(str(file))
    library.sqft_inflate.restype = ctypes.c_int64
    return library


def kept_bytes(mask: Bytes, elements: int, bits: int) -> list[int]:
    """Return the bytes that the kept codes of each chunk take, counted from the mask."""
    counts = []
    for start in range(0, len(mask), CHUNK // 8):
        part = mask[start : start + CHUNK // 8]
        words = part[: len(part) // 8 * 8].view(np.uint64)  # count 8 bytes at once
        rest = part[len(words) * 8 :]
        counts.append(int(np.bitwise_count(words).sum(dtype=np.int64)))
        counts[-1] += int(np.bitwise_count(rest).sum(dtype=np.int64))
    return [-(-count * bits // 8) for count in counts]


def _inflate_numpy(
    bits: int, mask: Bytes, first: int, count: int, kept: Bytes, fill: np.ndarray, group: int
) -> np.ndarray:
    """Return the dense bytes (uint8) of elements ``first`` to ``first + count``."""
    chosen = np.unpackbits(mask[first // 8 : -(-(first + count) // 8)], bitorder="little")
    chosen = chosen[:count].astype(bool)
    kind = {4: np.uint8, 8: np.uint8, 16: np.uint16, 32: np.uint32}[bits]
    if group:
        dense = _fill_per_element(fill, group, first, count).astype(kind)
    else:
        dense = np.full(count, fill[0], kind)
    if bits == 4:
        codes = np.stack([kept & 15, kept >> 4], axis=1).reshape(-1)[: chosen.sum()]
    else:
        codes = kept.view(kind)
    dense[chosen] = codes
    if bits == 4:
        dense = np.concatenate([dense, np.zeros(count % 2, np.uint8)])
        return dense[0::2] | (dense[1::2] << 4)
    return dense.view(np.uint8)


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _write_chunk(
    bits: int,
    mask: Bytes,
    first: int,
    count: int,
    kept: Bytes,
    fill: np.ndarray,
    group: int,
    out: Memory | DenseFile,
    at: int,
    library: ctypes.CDLL | None,
) -> None:
    with out.part(at + first * bits // 8, -(-count * bits // 8)) as place:
        if library is None:
            place[:] = _inflate_numpy(bits, mask, first, count, kept, fill, group)
            return
        taken = library.sqft_inflate(
            ctypes.c_int(bits),
            _pointer(mask),
            ctypes.c_int64(first),
            ctypes.c_int64(count),
            _pointer(kept),
            ctypes.c_int64(len(kept)),
            _pointer(fill),
            ctypes.c_int64(group),
            _pointer(place),
            ctypes.c_int(library.sqft_level()),
        )
        assert taken >= 0  # the sizes were checked against the mask before


def inflate_chunk(
    bits: int, mask: Bytes, first: int, count: int, kept: Bytes, fill: np.ndarray, group: int
) -> Bytes:
    """Return the dense bytes of ``count`` elements from ``first`` on.

    :param first: a multiple of 8.
    :param mask: begins with element 0, as does ``fill``.
    :param kept: the kept codes of exactly these elements.
    """
    library = native_library()
    if library is None:
        return _inflate_numpy(bits, mask, first, count, kept, fill, group)
    out = Memory(np.empty(-(-count * bits // 8), np.uint8))
    before = -first * bits // 8
    _write_chunk(bits, mask, first, count, kept, fill, group, out, before, library)
    return out.array


def inflate(
    bits: int,
    elements: int,
    mask: Bytes,
    kept: Bytes,
    fill: np.ndarray,
    group: int,
    out: Memory | DenseFile,
    at: int,
    pool: Executor,
    library: ctypes.CDLL | Callable[[], ctypes.CDLL | None] | None = native_library,
) -> list[Future[None]]:
    """Start to write a tensor's dense bytes to ``out``, from offset ``at`` on.

    :param bits: per element: 4, 8, 16 or 32.
    :param mask: ``ceil(elements / 8)`` bytes, lowest bit first; bits past the end are zero.
    :param kept: the kept codes; those of each chunk start on a whole byte.
    :param fill: uint32, the value of elements that are not kept: one, or one per group.
    :param group: consecutive elements that share a fill; 0 if all do.
    :return: tasks on ``pool``; ``out`` is complete when all of them are done.
    :raises ValueError: if the sizes are inconsistent.
    """
    sizes = _check_sizes(bits, elements, mask, kept, fill, group)
    library = library() if callable(library) else library
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    tasks: list[Future[None]] = []
    for index, first in enumerate(range(0, elements, CHUNK)):
        count = min(CHUNK, elements - first)
        codes = kept[starts[index] : starts[index + 1]]
        tasks.append(
            pool.submit(
                _write_chunk, bits, mask, first, count, codes, fill, group, out, at, library
            )
        )
    return tasks


def _check_sizes(
    bits: int, elements: int, mask: Bytes, kept: Bytes, fill: np.ndarray, group: int
) -> list[int]:
    """Return the bytes of the kept codes of each chunk.

    :raises ValueError: if the sizes are inconsistent.
    """
    sizes = kept_bytes(mask, elements, bits)
    if len(mask) != -(-elements // 8):
        raise ValueError("mask has the wrong length for the number of elements")
    if elements % 8 and mask[-1] >> (elements % 8):
        raise ValueError("mask has bits past its end")
    if sum(sizes) != len(kept):
        raise ValueError(f"mask announces {sum(sizes)} bytes of kept codes, {len(kept)} are there")
    if group and -(-elements // group) > len(fill):
        raise ValueError("there are fewer fills than groups")
    return sizes


def deflate(
    bits: int, elements: int, dense: Bytes, fill: np.ndarray, group: int
) -> tuple[Bytes, Bytes]:
    """Return mask and kept codes of a tensor's dense bytes: the inverse of :func:`inflate`.

    Chunks are processed in parallel on all processors and joined in order.
    """
    work = partial(_deflate_chunk, bits, elements, dense, fill, group)
    nothing = np.empty(0, np.uint8)
    masks, kept = [nothing], [nothing]
    for mask, codes in map_in_order(work, range(0, elements, CHUNK)):
        masks.append(mask)
        kept.append(codes)
    return np.concatenate(masks), np.concatenate(kept)


def _deflate_chunk(
    bits: int, elements: int, dense: Bytes, fill: np.ndarray, group: int, first: int
) -> tuple[Bytes, Bytes]:
    """Return mask and kept codes of the chunk that begins with element ``first``."""
    kind = {4: np.uint8, 8: np.uint8, 16: np.uint16, 32: np.uint32}[bits]
    count = min(CHUNK, elements - first)
    part = dense[first * bits // 8 : -(-(first + count) * bits // 8)]
    if bits == 4:
        codes = np.stack([part & 15, part >> 4], axis=1).reshape(-1)[:count]
    else:
        codes = part.view(kind)
    chosen = codes != (_fill_per_element(fill, group, first, count) if group else fill[0])
    codes = codes[chosen]
    if bits == 4:
        codes = np.concatenate([codes, np.zeros(len(codes) % 2, np.uint8)])
        codes = codes[0::2] | (codes[1::2] << 4)
    return np.packbits(chosen, bitorder="little"), codes.view(np.uint8)


def _fill_per_element(fill: np.ndarray, group: int, first: int, count: int) -> np.ndarray:
    """Return one fill per element for ``count`` elements from ``first`` on."""
    start = first // group
    repeated = np.repeat(fill[start : -(-(first + count) // group)], group)
    return repeated[first - start * group :][:count]
