"""The compiled kernels: what is here, laying matrices out, multiplying.

The library comes from the installed package, never from a deployment.
"""

import ctypes
import functools
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sqft_export.compiled import built_library
from sqft_export.errors import DamagedError
from sqft_export.run.host import allowed_processors

FORMATS = ("dense", "mask", "pairs")
HUGE_PAGE = 2**21


class MatrixHeader(ctypes.Structure):
    """``SqftMatrix`` of matrix.h, which says what the fields are."""

    _fields_ = (
        ("magic", ctypes.c_char * 8),
        *(
            (name, ctypes.c_uint32)
            for name in (
                *("version", "format", "bits", "lanes", "asymmetric", "rows", "inputs"),
                *("stored_group", "group", "span", "groups", "tiles", "resident"),
            )
        ),
        *(
            (name, ctypes.c_uint64)
            for name in ("group_bytes", "offsets", "narrow", "fixed", "kept", "bytes")
        ),
    )


class _Kernels(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("lanes", ctypes.c_uint32),
        ("here", ctypes.c_void_p),
        ("round", ctypes.c_void_p),
        ("one", ctypes.c_void_p),
        ("many", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Kernels:
    """Those of one instruction set.

    name: avx512-amx, avx512, avx2-vnni, avx2, neon or plain. lanes: rows of a vector.
    """

    name: str
    lanes: int

    @property
    def any_mask_pays(self) -> bool:
        """Whether it expands any mask about as fast as memory is read."""
        return self.name in ("avx512-amx", "avx512")


def open_library(file: Path) -> Any:
    """A library built of this folder's sources."""
    library = ctypes.CDLL(str(file))
    library.sqft_kernels.restype = ctypes.POINTER(_Kernels)
    return library


@functools.cache
def kernel_library() -> Any:
    """The one that was built with the package, or None where no compiler was."""
    file = built_library(Path(__file__).parent, "_kernels")
    return open_library(file) if file else None


def kernels_here(name: str | None = None, library: Any = None) -> Kernels | None:
    """The best that this processor runs, or those of a name; None where there are none."""
    library = library or kernel_library()
    found = library.sqft_kernels(name.encode() if name else None) if library else None
    return Kernels(found[0].name.decode(), found[0].lanes) if found else None


@dataclass(frozen=True)
class Matrix:
    """A compressed matrix as a runtime stores it.

    codes: uint8 ``[bytes]``, row major; two a byte for 4 bits, the lower nibble first.
    flip: what each code is xored with to be unsigned: ``2^(bits-1)`` where it is signed.
    zero: uint8 ``[rows, groups]``, or None: symmetric, ``2^(bits-1)``.
    scale: float16 ``[rows, groups]``.
    """

    bits: int
    rows: int
    inputs: int
    codes: np.ndarray
    flip: int
    zero: np.ndarray | None
    scale: np.ndarray

    @property
    def group(self) -> int:
        return self.inputs // self.scale.shape[1]


def _pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


@dataclass(frozen=True)
class Kept:
    """counts: uint32 ``[rows]``, codes that are not zero. pairs: no 4 inputs have more than 2."""

    counts: np.ndarray
    pairs: bool


def count_kept(matrix: Matrix, library: Any = None) -> Kept:
    kept = np.empty(matrix.rows, np.uint32)
    pairs = (library or kernel_library()).sqft_count(
        *(_pointer(matrix.codes), matrix.bits, matrix.flip, _pointer(matrix.zero)),
        *(matrix.rows, matrix.inputs, matrix.group, _pointer(kept)),
    )
    return Kept(kept, bool(pairs))


def planned(
    matrix: Matrix, form: str, lanes: int, kept: np.ndarray, library: Any = None
) -> MatrixHeader | None:
    """The header of a matrix laid out in a format; ``header.bytes`` is what it takes.

    :return: None if the shape can't be laid out.
    """
    header = MatrixHeader(
        format=FORMATS.index(form),
        bits=matrix.bits,
        lanes=lanes,
        asymmetric=matrix.zero is not None,
        rows=matrix.rows,
        inputs=matrix.inputs,
        stored_group=matrix.group,
    )
    library = library or kernel_library()
    return None if library.sqft_plan(ctypes.byref(header), _pointer(kept)) else header


def lay_out(
    header: MatrixHeader, matrix: Matrix, kept: np.ndarray, out: np.ndarray, library: Any = None
) -> None:
    """Write a planned matrix to ``out``, uint8 ``[header.bytes]``, from a multiple of 64 on."""
    library = library or kernel_library()
    out[: ctypes.sizeof(MatrixHeader)] = np.frombuffer(bytes(header), np.uint8)
    library.sqft_place(_pointer(out), _pointer(kept))
    pieces = np.linspace(0, header.tiles, 4 * allowed_processors() + 1).astype(int)

    def part(first: int, last: int) -> None:
        library.sqft_pack(
            *(_pointer(out), _pointer(matrix.codes), matrix.flip, _pointer(matrix.zero)),
            *(_pointer(matrix.scale), ctypes.c_size_t(first), ctypes.c_size_t(last)),
        )

    with ThreadPoolExecutor(allowed_processors()) as pool:
        for _ in pool.map(part, pieces[:-1], pieces[1:]):
            pass
    library.sqft_seal(_pointer(out))


def _header(blob: np.ndarray) -> MatrixHeader:
    return MatrixHeader.from_buffer_copy(blob[: ctypes.sizeof(MatrixHeader)].tobytes())


def header_of(blob: np.ndarray, name: str, library: Any = None) -> MatrixHeader:
    """The header of a matrix that was laid out.

    :raises DamagedError: if anything it says does not lie within the bytes.
    """
    size = ctypes.c_size_t(blob.nbytes)
    if (library or kernel_library()).sqft_check(_pointer(blob), size):
        raise DamagedError(f"{name}: its weights are not laid out as these kernels read them")
    return _header(blob)


def read_out(blob: np.ndarray, name: str, library: Any = None) -> Matrix:
    """The inverse of :func:`lay_out`: codes a byte each, zero points always there.

    :raises DamagedError: if it is damaged.
    """
    header = header_of(blob, name, library)
    codes = np.empty((header.rows, header.inputs), np.uint8)
    groups = header.inputs // header.stored_group
    zero = np.empty((header.rows, groups), np.uint8)
    scale = np.empty((header.rows, groups), np.float16)
    library = library or kernel_library()
    library.sqft_unpack(_pointer(blob), _pointer(codes), _pointer(zero), _pointer(scale))
    return Matrix(header.bits, header.rows, header.inputs, codes, 0, zero, scale)


def in_huge_pages(array: np.ndarray) -> None:
    """Ask for huge pages for memory that was not written yet; where there are none, go without.

    Reading at full speed needs them: with pages of 4 KiB half a gain is lost.
    """
    first = -array.ctypes.data % HUGE_PAGE
    length = (array.nbytes - first) // HUGE_PAGE * HUGE_PAGE
    if length > 0 and hasattr(mmap, "MADV_HUGEPAGE"):
        address = ctypes.c_void_p(array.ctypes.data + first)
        ctypes.CDLL(None).madvise(address, ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)


def aligned(size: int, to: int = HUGE_PAGE) -> np.ndarray:
    """Uint8 ``[size]`` from a multiple of ``to`` on; pages that are not written take no memory."""
    memory = np.empty(size + to, np.uint8)
    start = -memory.ctypes.data % to
    array = memory[start : start + size]
    in_huge_pages(array)
    return array


def multiply(
    blob: np.ndarray,
    x: np.ndarray,
    mode: str = "auto",
    kernels: str | None = None,
    library: Any = None,
) -> np.ndarray:
    """Products of a matrix, on one thread: float32 ``[tokens, rows]``.

    :param blob: what :func:`lay_out` wrote or :func:`header_of` has checked.
    :param x: float32 ``[tokens, inputs]``.
    :param mode: one: token by token; many: all at once; exact: activations are not rounded; auto:
        one or many, as a runtime is given it.
    :param kernels: of an instruction set; None: the best here.
    """
    library = library or kernel_library()
    tokens, rows = len(x), _header(blob).rows
    y = np.empty((tokens, rows), np.float32)
    modes = {"auto": 0, "one": 1, "many": 2, "exact": 3}
    run: Callable[..., int] = library.sqft_multiply
    x = np.ascontiguousarray(x, np.float32)
    name = kernels.encode() if kernels else None
    if run(name, _pointer(blob), _pointer(x), ctypes.c_size_t(tokens), _pointer(y), modes[mode]):
        raise MemoryError
    return y
